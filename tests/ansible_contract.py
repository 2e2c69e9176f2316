"""The contract of engines and reaches: unit tests run it on the fakes, integration tests on the real ones.

Its tests look at the worker afterwards, never at calls.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from itertools import count

import pytest
from support.builders import AUTHORITIES

from orion.manager.ansible.port import OF_ONE_BOOT, OTHER_BOOT, Action, Engine, Job, Outcome
from orion.manager.fakes.workers import Account
from orion.manager.ssh.authority import Authority
from orion.manager.ssh.port import Host, Reach, Reached
from orion.rental_order import RentalOrder

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA1u4uxDZrVBrtPLCdoyRvjgTAcxyaAZ7bVpKZbyTsA5"
OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBW2lM+KrHdlPjrhU9YMGgNPrJmG2vFXJ6y5ZSZdJ8bD"

_numbers = count(1)


class EngineBench(ABC):
    """An engine, a reach and one worker to try them on."""

    engine: Engine
    reach: Reach
    host: Host

    @abstractmethod
    async def accounts(self) -> dict[str, Account]:
        """Return the accounts on the worker, by rental."""

    @abstractmethod
    async def pause(self) -> None: ...

    @abstractmethod
    async def resume(self) -> None: ...

    def nowhere(self) -> Host:
        """Return an address where nothing answers."""
        return replace(self.host, port=1)

    def impostor(self) -> Host:
        """Return the worker's address, pinned with a host key that the worker does not have."""
        return replace(self.host, host_keys=(OTHER_KEY,))


def new_job(host: Host, *, epoch: int = 1, keys: tuple[str, ...] = (KEY,), deadline_s: float = 30.0) -> Job:
    """Return a job that creates a rental of its own."""
    number = next(_numbers)
    rental_id = f"contract{number:02d}".translate(str.maketrans("0123456789", "abcdefghij"))
    order = RentalOrder(
        rental_id=rental_id, username=f"r-{rental_id}", uid=200_000 + number, epoch=epoch, public_keys=keys
    )
    return Job(action=Action.CREATE, host=host, order=order, deadline_s=deadline_s)


def account(job: Job) -> Account:
    return Account(
        username=job.order.username, uid=job.order.uid, epoch=job.order.epoch, keys=job.order.public_keys, unlocked=True
    )


def certificate(job: Job) -> str:
    """Return a host certificate that the worker could show to this rental's renter."""
    authority = Authority(*AUTHORITIES, time.time)
    return authority.host_certificate(authority.next_serial(), "w-any", job.host.host_keys, [job.order.rental_id]).line


def assert_done(outcome: Outcome) -> None:
    assert outcome.ok, outcome.message


def deletion(job: Job) -> Job:
    return replace(job, action=Action.DELETE).with_order(public_keys=())


class EngineContract:
    """A subclass gives the fixture `bench`."""

    async def test_a_created_rental_is_on_the_worker_and_unlocked(self, bench: EngineBench) -> None:
        job = new_job(bench.host)
        assert_done(await bench.engine.run(job))
        assert (await bench.accounts())[job.order.rental_id] == account(job)

    async def test_a_prepared_rental_is_on_the_worker_and_locked_until_it_is_created(self, bench: EngineBench) -> None:
        job = new_job(bench.host)
        prepared = replace(job, action=Action.PREPARE)
        for _ in range(2):
            outcome = await bench.engine.run(prepared)
            assert_done(outcome)
            assert outcome.report["state"] == "locked"
        assert (await bench.accounts())[job.order.rental_id] == replace(account(job), unlocked=False)
        assert_done(await bench.engine.run(job))
        assert (await bench.accounts())[job.order.rental_id] == account(job)
        again = await bench.engine.run(prepared)
        assert again.report["state"] == "running", "a renter who could log in still can"
        assert (await bench.accounts())[job.order.rental_id] == account(job)

    async def test_creating_again_changes_nothing_and_says_so(self, bench: EngineBench) -> None:
        job = new_job(bench.host)
        first = await bench.engine.run(job)
        again = await bench.engine.run(job)
        assert_done(again)
        assert (first.report["changed"], again.report["changed"]) == (True, False)
        assert (await bench.accounts())[job.order.rental_id] == account(job)

    async def test_creating_again_with_other_keys_replaces_them(self, bench: EngineBench) -> None:
        job = new_job(bench.host)
        await bench.engine.run(job)
        changed = job.with_order(public_keys=(OTHER_KEY, KEY))
        assert_done(await bench.engine.run(changed))
        assert (await bench.accounts())[job.order.rental_id] == account(changed)

    async def test_a_higher_epoch_takes_over(self, bench: EngineBench) -> None:
        job = new_job(bench.host)
        await bench.engine.run(job)
        later = job.with_order(epoch=4)
        assert_done(await bench.engine.run(later))
        assert (await bench.accounts())[job.order.rental_id] == account(later)

    @pytest.mark.parametrize("action", list(Action))
    async def test_a_lower_epoch_is_refused_and_changes_nothing(self, bench: EngineBench, action: Action) -> None:
        job = new_job(bench.host, epoch=3)
        await bench.engine.run(job)
        line = certificate(job) if action is Action.CERTIFY else ""
        older = replace(job, action=action).with_order(epoch=2, public_keys=(OTHER_KEY,), host_certificate=line)
        outcome = await bench.engine.run(older)
        assert not outcome.ok
        assert "epoch 2" in outcome.message
        assert (await bench.accounts())[job.order.rental_id] == account(job)

    @pytest.mark.parametrize("action", sorted(OF_ONE_BOOT))
    async def test_an_order_for_another_boot_of_the_container_is_refused_and_changes_nothing(
        self, bench: EngineBench, action: Action
    ) -> None:
        job = new_job(bench.host)
        assert_done(await bench.engine.run(job))
        late = replace(job, action=action, host=replace(bench.host, boot_id="another-life"))
        late = late.with_order(public_keys=(OTHER_KEY,))
        outcome = await bench.engine.run(late)
        assert (outcome.ok, outcome.report["code"]) == (False, OTHER_BOOT)
        assert (await bench.accounts())[job.order.rental_id] == account(job)

    async def test_a_rental_is_purged_in_any_boot_of_the_container(self, bench: EngineBench) -> None:
        job = new_job(bench.host)
        assert_done(await bench.engine.run(job))
        assert_done(await bench.engine.run(replace(deletion(job), host=replace(bench.host, boot_id="another-life"))))
        assert job.order.rental_id not in await bench.accounts()

    async def test_a_host_certificate_is_accepted_only_for_the_present_epoch(self, bench: EngineBench) -> None:
        job = new_job(bench.host, epoch=2)
        certify = replace(job, action=Action.CERTIFY)
        certify = certify.with_order(host_certificate=certificate(job), public_keys=())
        assert not (await bench.engine.run(certify)).ok, "there is no such rental"
        await bench.engine.run(job)
        assert not (await bench.engine.run(certify.with_order(epoch=3))).ok
        for changed in (True, False):
            outcome = await bench.engine.run(certify)
            assert_done(outcome)
            assert outcome.report["changed"] is changed
        assert (await bench.accounts())[job.order.rental_id] == account(job)

    async def test_a_deleted_rental_leaves_nothing_and_the_report_says_so(self, bench: EngineBench) -> None:
        job = new_job(bench.host)
        await bench.engine.run(job)
        outcome = await bench.engine.run(deletion(job))
        assert_done(outcome)
        assert outcome.report["left"] == []
        assert outcome.report["looked"]
        assert job.order.rental_id not in await bench.accounts()

    async def test_deleting_again_or_an_unknown_rental_succeeds(self, bench: EngineBench) -> None:
        job = deletion(new_job(bench.host))
        for _ in range(2):
            assert_done(await bench.engine.run(job))
        assert job.order.rental_id not in await bench.accounts()

    async def test_a_deleted_epoch_never_comes_back_but_a_higher_one_may(self, bench: EngineBench) -> None:
        job = new_job(bench.host)
        await bench.engine.run(deletion(job))
        refused = await bench.engine.run(job)
        assert not refused.ok
        assert "epoch 1" in refused.message
        assert job.order.rental_id not in await bench.accounts()
        later = job.with_order(epoch=2)
        assert_done(await bench.engine.run(later))
        assert (await bench.accounts())[job.order.rental_id] == account(later)

    async def test_another_rental_cannot_take_a_uid_that_is_in_use(self, bench: EngineBench) -> None:
        holder = new_job(bench.host)
        await bench.engine.run(holder)
        outcome = await bench.engine.run(new_job(bench.host).with_order(uid=holder.order.uid))
        assert not outcome.ok
        assert str(holder.order.uid) in outcome.message

    async def test_jobs_run_in_parallel_and_each_gets_its_own_answer(self, bench: EngineBench) -> None:
        jobs = [new_job(bench.host, epoch=number) for number in range(1, 7)]
        outcomes = await asyncio.gather(*(bench.engine.run(job) for job in jobs))
        assert [outcome.report.get("epoch") for outcome in outcomes] == [job.order.epoch for job in jobs]
        accounts = await bench.accounts()
        assert [accounts[job.order.rental_id] for job in jobs] == [account(job) for job in jobs]

    async def test_a_worker_that_does_not_answer_is_reported_as_unreachable(self, bench: EngineBench) -> None:
        outcome = await bench.engine.run(new_job(bench.nowhere()))
        assert not outcome.ok
        assert outcome.message.startswith("the worker cannot be reached by SSH")

    async def test_another_host_key_is_refused_and_reported(self, bench: EngineBench) -> None:
        job = new_job(bench.impostor())
        outcome = await bench.engine.run(job)
        assert not outcome.ok
        assert "another host key" in outcome.message
        assert job.order.rental_id not in await bench.accounts()

    async def test_a_job_on_a_worker_that_hangs_ends_at_its_deadline(self, bench: EngineBench) -> None:
        await bench.pause()
        try:
            outcome = await bench.engine.run(new_job(bench.host, deadline_s=0.5))
        finally:
            await bench.resume()
        assert not outcome.ok
        assert outcome.message == "timed out after 0.5 s"

    async def test_a_worker_that_hung_takes_jobs_again(self, bench: EngineBench) -> None:
        await bench.pause()
        await bench.engine.run(new_job(bench.host, deadline_s=0.2))
        await bench.resume()
        job = new_job(bench.host)
        assert_done(await bench.engine.run(job))
        assert (await bench.accounts())[job.order.rental_id] == account(job)


class ReachContract:
    """A subclass gives the fixture `bench`."""

    async def test_a_worker_with_its_pinned_host_key_is_reached(self, bench: EngineBench) -> None:
        assert await bench.reach.reach(bench.host, 60) is Reached.YES

    async def test_any_one_of_several_pinned_host_keys_is_enough(self, bench: EngineBench) -> None:
        several = replace(bench.host, host_keys=(OTHER_KEY, *bench.host.host_keys))
        assert await bench.reach.reach(several, 60) is Reached.YES

    async def test_another_host_key_is_an_impostor(self, bench: EngineBench) -> None:
        assert await bench.reach.reach(bench.impostor(), 60) is Reached.IMPOSTOR

    async def test_an_address_where_nothing_answers_is_not_reached(self, bench: EngineBench) -> None:
        assert await bench.reach.reach(bench.nowhere(), 60) is Reached.NO

    async def test_a_worker_that_hangs_is_not_reached_in_time(self, bench: EngineBench) -> None:
        await bench.pause()
        try:
            assert await bench.reach.reach(bench.host, 0.3) is Reached.NO
        finally:
            await bench.resume()
