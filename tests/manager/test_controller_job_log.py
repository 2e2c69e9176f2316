"""The job log of a rental can be read by its owner, holds no key, and does not grow without end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.builders import host_key
from support.harness import Harness
from test_api_rentals import rent_and_wait

from orion.manager.ansible.port import Action, Job, Outcome
from orion.manager.controllers.job_log import JobLog, LoggedEngine, readable
from orion.manager.ssh.port import Host
from orion.manager.store import job_log
from orion.manager.store.database import Store
from orion.manager.store.job_log import PER_RENTAL, Entry
from orion.rental_order import RentalOrder

ENTRY = Entry(
    at=1000.0,
    rental_id="one",
    epoch=1,
    action="create_user",
    worker_id="w-abcdefgh",
    ok=True,
    seconds=0.04,
    message="made",
)
JOB = Job(
    action=Action.CREATE,
    host=Host(worker_id="w-abcdefgh", address="192.0.2.7", host_keys=()),
    order=RentalOrder(rental_id="one", username="r-one", uid=100_000, epoch=3),
)


async def test_only_the_owner_and_an_admin_can_read_the_job_log(harness: Harness) -> None:
    agent = await harness.join()
    alice, bob = await harness.new_client("alice"), await harness.new_client("bob")
    rental = (await rent_and_wait(harness, alice, name="lab")).json()
    reads = [await client.get(f"/api/rentals/{rental['id']}/log") for client in (alice, harness.as_admin)]
    for read in reads:
        (entry,) = read.json()["items"]
        assert (entry["action"], entry["worker_id"], entry["epoch"]) == ("create_user", agent.worker_id, 1)
        assert (entry["ok"], entry["message"]) == (True, "made")
    assert (await bob.get(f"/api/rentals/{rental['id']}/log")).status_code == 404


async def test_a_job_that_failed_says_why_and_how_long_it_took(store: Store) -> None:
    class Failing:
        async def run(self, job: Job) -> Outcome:
            times.append(1000.25)
            return Outcome(ok=False, message="the worker cannot be reached by SSH: no route to host")

    times = [1000.0]
    log = JobLog(store)
    outcome = await LoggedEngine(engine=Failing(), note=log.note, monotonic=lambda: times[-1], wall=lambda: 5.0).run(
        JOB
    )
    (row,) = await log.of("one")
    assert (row["ok"], row["seconds"], row["at"], row["epoch"]) == (False, 0.25, 5.0, 3)
    assert row["message"] == outcome.message


@pytest.mark.parametrize(
    "secret",
    [
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY----- b3BlbnNzaC1rZXktdjEAAAAA",
        host_key(1),
        "orion_admin_admin_" + "A" * 43,
        "A" * 64 + "==",
    ],
)
def test_the_job_log_contains_no_key_and_no_token(secret: str) -> None:
    shown = readable(f"it said {secret}")
    assert shown.startswith("it said (not shown)")
    assert not any(part in shown for part in secret.split() if len(part) > 20)


async def test_the_latest_job_logs_of_a_rental_are_kept(store: Store) -> None:
    for start in range(0, 3 * PER_RENTAL, 30):
        entries = [replace(ENTRY, seconds=float(number)) for number in range(start, start + 30)]
        await store.write(job_log.add, [*entries, replace(ENTRY, rental_id="two")])
    kept = await store.read(job_log.of_rental, "one")
    assert [row["seconds"] for row in kept] == [float(number) for number in range(2 * PER_RENTAL, 3 * PER_RENTAL)]
    assert len(await store.read(job_log.of_rental, "two")) == 5


async def test_the_oldest_job_logs_are_removed_beyond_the_total(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "IN_TOTAL", 7)
    for number in range(20):
        await store.write(job_log.add, [replace(ENTRY, rental_id=f"r{number}")])
    kept = [number for number in range(20) if await store.read(job_log.of_rental, f"r{number}")]
    assert kept == list(range(13, 20))


async def test_a_job_log_that_could_not_be_written_is_written_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = JobLog(store)
    log.note(ENTRY)
    with monkeypatch.context() as broken:
        broken.setattr(job_log, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await log.flush()
    assert len(await log.of("one")) == 1
