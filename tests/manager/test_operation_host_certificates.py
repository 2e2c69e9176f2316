"""Host certificates of workers: which rentals they name, and when they are signed again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import asyncssh
import pytest
from orion_worker.rental.host_certificate import read_certificate
from support.harness import Harness

from orion.manager.ansible.port import Action, Job, Outcome
from orion.manager.domain.host_certificates import FRESH_S, LIFETIME_S
from orion.manager.operations import host_certificates
from orion.manager.ssh.port import Host
from orion.manager.store import rentals
from orion.rental_order import RentalOrder


def named(certificate: str) -> set[str]:
    """Return the principals of a host certificate that the authority of hosts has signed."""
    read: Any = asyncssh.import_certificate(certificate)
    return {str(name).removesuffix(".orion") for name in read.principals}


async def job_of(harness: Harness, rental_id: str) -> Job:
    row = await harness.store.read(rentals.one, rental_id, None)
    assert row is not None
    host = Host(worker_id=row["worker_id"], address=row["address"], host_keys=tuple(row["host_keys"]))
    order = RentalOrder(rental_id=rental_id, username=row["username"], uid=row["uid"], epoch=row["epoch"])
    return Job(action=Action.CERTIFY, host=host, order=order)


async def test_a_worker_s_host_certificate_names_its_rentals_from_the_first_moment(harness: Harness) -> None:
    worker = await harness.join(slots=3)
    first = await harness.rent()
    assert named(worker.node.host_certificate) == {first["id"]}
    second = await harness.rent()
    assert named(worker.node.host_certificate) == {first["id"], second["id"]}


async def test_a_host_certificate_is_signed_by_the_authority_of_hosts_for_the_pinned_key(harness: Harness) -> None:
    worker = await harness.join()
    await harness.rent()
    read: Any = asyncssh.import_certificate(worker.node.host_certificate)
    signer = " ".join(read.signing_key.export_public_key("openssh").decode().split()[:2])
    assert signer == harness.manager.authority.of_hosts != harness.manager.authority.of_users
    key = " ".join(read.key.export_public_key("openssh").decode().split()[:2])
    assert (key,) == worker.node.host.host_keys


async def test_after_a_takeover_the_new_worker_is_named_and_the_old_one_never_again(harness: Harness) -> None:
    first, second = await harness.join(), await harness.join()
    rental = await harness.rent()
    there = harness.agent_of(rental)
    other = second if there is first else first
    there.die()
    await harness.silence(there, 100)
    await harness.pass_time(10)
    moved = await harness.rental(rental["id"])
    assert moved["worker_id"] == other.worker_id
    assert named(other.node.host_certificate) == {rental["id"]}
    old = there.node.host_certificate
    job = await job_of(harness, rental["id"])
    await harness.manager.certificates.ensure(replace(job, host=replace(there.node.host, worker_id=there.worker_id)))
    assert there.node.host_certificate == old


async def test_a_released_rental_is_not_named_in_the_next_host_certificate(harness: Harness) -> None:
    worker = await harness.join(slots=3)
    first, second = await harness.rent(), await harness.rent()
    await harness.as_admin.delete(f"/api/rentals/{first['id']}")
    await harness.settle()
    harness.clock.now += LIFETIME_S
    await harness.manager.certificates.ensure(await job_of(harness, second["id"]))
    assert named(worker.node.host_certificate) == {second["id"]}


async def test_a_host_certificate_that_will_soon_end_is_renewed_at_a_session(harness: Harness) -> None:
    worker = await harness.join()
    job = await job_of(harness, (await harness.rent())["id"])
    before = worker.node.host_certificate
    harness.clock.now += LIFETIME_S - FRESH_S - 1
    await harness.manager.certificates.ensure(job)
    assert worker.node.host_certificate == before
    harness.clock.now += 2
    await harness.manager.certificates.ensure(job)
    await asyncio.gather(
        *harness.manager.certificates._renewing.values()
    )  # in the background, because the old one is valid for a while
    assert worker.node.host_certificate != before


async def test_an_ended_host_certificate_is_renewed_before_a_session_opens(harness: Harness) -> None:
    worker = await harness.join()
    job = await job_of(harness, (await harness.rent())["id"])
    before = worker.node.host_certificate
    harness.clock.now += LIFETIME_S
    await harness.manager.certificates.ensure(job)
    assert worker.node.host_certificate != before


@pytest.mark.parametrize("ahead_s", [120.0, 7200.0, 40 * 86_400.0])
async def test_a_host_certificate_signed_by_a_clock_that_was_ahead_is_renewed_afterwards(
    harness: Harness, ahead_s: float
) -> None:
    worker = await harness.join()
    job = await job_of(harness, (await harness.rent())["id"])
    harness.clock.wall_offset += ahead_s
    harness.clock.now += LIFETIME_S
    await harness.manager.certificates.ensure(job)
    wrong = worker.node.host_certificate
    harness.clock.wall_offset -= ahead_s
    await harness.manager.certificates.ensure(job)
    assert worker.node.host_certificate != wrong
    assert read_certificate(worker.node.host_certificate).serial > read_certificate(wrong).serial
    right = worker.node.host_certificate
    await harness.manager.certificates.ensure(job)
    assert worker.node.host_certificate == right


async def test_after_a_restart_of_the_manager_the_first_session_renews_the_host_certificate(harness: Harness) -> None:
    worker = await harness.join()
    job = await job_of(harness, (await harness.rent())["id"])
    before = worker.node.host_certificate
    await harness.restart()
    await harness.manager.certificates.ensure(job)
    assert worker.node.host_certificate != before


async def test_a_failing_worker_does_not_delay_a_session_without_end(harness: Harness) -> None:
    worker = await harness.join()
    job = await job_of(harness, (await harness.rent())["id"])
    harness.clock.now += LIFETIME_S
    worker.node.failure = "its disk is full"
    before = worker.node.host_certificate
    await harness.manager.certificates.ensure(job)
    assert worker.node.host_certificate == before


async def test_a_renter_that_delays_its_own_renewal_does_not_delay_another_s(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await harness.join(slots=2)
    monkeypatch.setattr(host_certificates, "CERTIFY_WITHIN_S", 600.0)
    slow, other = [
        replace(await job_of(harness, (await harness.rent())["id"]), owner=owner) for owner in ("slow", "other")
    ]
    harness.clock.now += LIFETIME_S
    run, before = harness.manager.certificates.engine.run, worker.node.host_certificate

    async def held_up(job: Job) -> Outcome:
        if job.order.rental_id == slow.order.rental_id:
            await asyncio.Event().wait()
        return await run(job)

    monkeypatch.setattr(harness.manager.certificates.engine, "run", held_up)
    waiting = asyncio.create_task(harness.manager.certificates.ensure(slow))
    await asyncio.sleep(0)
    async with asyncio.timeout(60):  # less than the wait for the slow one
        await harness.manager.certificates.ensure(other)
    assert worker.node.host_certificate != before
    waiting.cancel()


async def test_an_order_of_a_former_epoch_brings_no_certificate(harness: Harness) -> None:
    worker = await harness.join()
    job = await job_of(harness, (await harness.rent())["id"])
    before = worker.node.host_certificate
    harness.clock.now += LIFETIME_S
    await harness.manager.certificates.ensure(job.with_order(epoch=job.order.epoch + 1))
    assert worker.node.host_certificate == before


async def test_rentals_that_are_taken_over_together_are_named_by_one_host_certificate(harness: Harness) -> None:
    first = await harness.join(slots=8)
    rentals_there = [await harness.rent() for _ in range(6)]
    other = await harness.join(slots=8)
    first.die()
    await harness.silence(first, 100)
    await harness.pass_time(10)
    assert named(other.node.host_certificate) == {rental["id"] for rental in rentals_there}
    assert other.node.sshd_restarts < len(rentals_there)
