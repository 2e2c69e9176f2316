"""Tests that a snapshot holds every entry of a home, in a state that existed: real workers, the real snapshot service.

The renter's bank (support/bank.py) detects a state that never existed; support/difficult_tree.py makes difficult files.
"""

from __future__ import annotations

import asyncio
import difflib
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rental_support import Rental, new_rental
from snapshot_service_contract import refusal
from snapshot_support import RealSnapshotService, home_of, snapshot_service
from support import bank, difficult_tree
from test_snapshots import _rental, migrate
from worker_support import Worker, docker, wait_until

from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.snapshots.port import Taken

ROOMY = SnapshotLimits(max_files=100_000, max_bytes=1 << 30)
MOVE = 1_000_000
"""The number of a planned migration, which only rises."""
BANK_S = 60.0
BALLAST = "head -c 60000000 /dev/urandom > bank/c"
"""A large file, by its name between the bank's files, so that a sequential read takes these at different times."""
ATTRIBUTES_MB = 100


@pytest.fixture(scope="module")
def real(pair: tuple[Worker, Worker], folder: Path) -> Iterator[RealSnapshotService]:
    with snapshot_service(folder, pair[0].key) as running:
        yield running


@pytest.fixture
def rental(pair: tuple[Worker, Worker], folder: Path) -> Iterator[Rental]:
    made = new_rental(pair[0], folder).create_quickly()
    yield made
    _remove(made, pair)


def _remove(rental: Rental, pair: tuple[Worker, Worker]) -> None:
    for worker in pair:
        for epoch in range(1, 4):
            worker.rental("purge", rental_id=rental.rental_id, username=rental.username, uid=rental.uid, epoch=epoch)


def _lay_down(rental: Rental, program: object) -> str:
    """Put a program of the renter outside of its home, so that no snapshot contains it."""
    path = f"/tmp/{rental.username}-{secrets.token_hex(3)}.py"  # noqa: S108 - of the renter
    source = Path(str(program.__file__)).read_text()  # type: ignore[attr-defined]
    done = rental.ssh(f"cat > {path}", source)
    assert done.returncode == 0, done.stderr
    return path


def _make_tree(rental: Rental, megabytes: int = 0) -> list[str]:
    _as_renter(rental, _lay_down(rental, difficult_tree), "make", f"/home/{rental.username}/tree", str(megabytes))
    return _listing(rental)


def _listing(rental: Rental) -> list[str]:
    program = _lay_down(rental, difficult_tree)
    return _as_renter(rental, program, "describe", f"/home/{rental.username}/tree").splitlines()


def _as_renter(rental: Rental, *command: str) -> str:
    """Without a session, which has to end in time: a busy disk may take minutes for 100 MB of attributes."""
    become = ("setpriv", f"--reuid={rental.uid}", f"--regid={rental.uid}", "--clear-groups")
    return docker("exec", rental.on.name, *become, "python3", *command, timeout_s=600)


def _differences(before: list[str], after: list[str]) -> str:
    lines = difflib.unified_diff(before, after, "before", "after", n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith("@@"))


async def _migrated(real: RealSnapshotService, rental: Rental, to: Worker) -> Rental:
    """Migrate as planned: a snapshot while the rental runs, a freeze, another snapshot, a restore elsewhere."""
    await real.client.take(home_of(rental), ROOMY)
    aside = f"/var/lib/orion-aside/{rental.rental_id}"

    def is_gone() -> bool:
        return not rental.on.run("sh", "-c", f"ls -d {aside} 2>/dev/null || true")

    await asyncio.to_thread(wait_until, is_gone, "the set-aside files are removed, on a busy disk late")
    await _rental(rental.on, "freeze", rental_id=rental.rental_id, epoch=rental.epoch, move=MOVE)
    await real.client.take(home_of(rental), ROOMY, deadline_s=60, for_migration=True)
    return await migrate(real, rental, to)


async def _taken_over(real: RealSnapshotService, rental: Rental, to: Worker) -> Rental:
    """Restore the last periodic snapshot, as after the loss of the worker."""
    taken = await real.client.take(home_of(rental), ROOMY)
    assert taken.snapshot.skipped == ()
    return await migrate(real, rental, to)


async def _recovered(real: RealSnapshotService, rental: Rental, to: Worker) -> Rental:
    """Restore the recovered snapshot of a lost worker that came back."""
    recovered = await real.client.recover(home_of(rental), ROOMY)
    assert recovered.snapshot.skipped == ()
    made = replace(rental, on=to, epoch=rental.epoch + 1)
    await _rental(to, "create", **made.variables, public_keys=[made.key.public])
    assert await real.client.restore(home_of(made), recovered.snapshot.id)
    await _rental(to, "unlock", rental_id=made.rental_id, epoch=made.epoch)
    return made


WAYS = {"planned migration": _migrated, "takeover": _taken_over, "recovered snapshot": _recovered}


@pytest.mark.parametrize("way", WAYS)
async def test_a_migration_keeps_bytes_and_modes_of_every_entry_of_a_home(
    way: str, real: RealSnapshotService, rental: Rental, neighbour: Worker
) -> None:
    before = await asyncio.to_thread(_make_tree, rental)
    after = await asyncio.to_thread(_listing, await WAYS[way](real, rental, neighbour))
    assert not _differences(before, after), f"by {way}:\n{_differences(before, after)}"


async def test_a_home_is_unchanged_after_two_migrations(
    real: RealSnapshotService, rental: Rental, pair: tuple[Worker, Worker]
) -> None:
    before = await asyncio.to_thread(_make_tree, rental)
    there = await _migrated(real, rental, pair[1])
    await _rental(pair[0], "purge", **rental.variables)
    back = await _taken_over(real, there, pair[0])
    after = await asyncio.to_thread(_listing, back)
    assert not _differences(before, after), _differences(before, after)


async def test_a_hundred_megabytes_of_attributes_are_migrated(
    real: RealSnapshotService, rental: Rental, neighbour: Worker
) -> None:
    before = await asyncio.to_thread(_make_tree, rental, ATTRIBUTES_MB)
    carried = sum("user.large" in line for line in before)
    if not carried:
        pytest.skip("the workers' file system carries no attributes of renters")
    assert carried * difficult_tree.LARGEST_ATTRIBUTE > 0.95 * (ATTRIBUTES_MB << 20)
    after = await asyncio.to_thread(_listing, await _migrated(real, rental, neighbour))
    assert not _differences(before, after), _differences(before, after)[:4000]


ODD = {
    "a file of root's that it can read": "echo x > odd; chmod 644 odd; chown root:root odd",
    "a file of root's that is shut to it": "echo x > odd; chmod 600 odd; chown root:root odd",
    "a folder of root's with files": "mkdir odd; echo x > odd/inside; chown -R root:root odd",
    "a file of another renter's uid": "echo x > odd; chown 99999:99999 odd",
    "an attribute that rsync takes for its own": (
        'echo x > odd; python3 -c \'import os; os.setxattr("odd", "user.rsync.%stat", b"100644 0,0 0:0")\'; '
        "chown --reference=. odd"
    ),
    "a path longer than any that can be named": (
        'python3 -c \'import os\nfor _ in range(45): os.mkdir("o" * 100); os.chdir("o" * 100)\nopen("odd", "w")\'; '
        "chown -R --reference=. o*"
    ),
}
ODD_LISTING = (
    "find . -printf '%p %y %m %U:%G %s %T@\\n' | sort; "
    "find . -name odd -type f -maxdepth 1 -exec python3 -c "
    "'import os, sys; print({n: os.getxattr(sys.argv[1], n) for n in os.listxattr(sys.argv[1])})' '{}' ';'"
)


@pytest.mark.parametrize("what", ODD)
async def test_a_migration_is_refused_with_the_names_of_entries_that_no_snapshot_can_hold(
    what: str, real: RealSnapshotService, rental: Rental, neighbour: Worker
) -> None:
    home = f"cd /home/{rental.username}"
    rental.ssh("echo precious > kept")
    rental.on.run("sh", "-ec", f"{home}; {ODD[what]}")
    before = rental.on.run("sh", "-c", f"{home}; {ODD_LISTING}")
    await _rental(rental.on, "freeze", rental_id=rental.rental_id, epoch=1, move=MOVE)
    copying = asyncio.create_task(real.client.take(home_of(rental), ROOMY, deadline_s=60, for_migration=True))
    (outcome,) = await asyncio.gather(copying, return_exceptions=True)
    if isinstance(outcome, Taken):
        migrated = await migrate(real, rental, neighbour)
        after = migrated.on.run("sh", "-c", f"{home}; {ODD_LISTING}")
        assert after == before, f"{what} changed, and the migration was not refused"
    else:
        text = str(await refusal(real.client.take(home_of(rental), ROOMY, deadline_s=60, for_migration=True)))
        assert "odd" in text or "oooooooooo" in text, f"{what}: refused without its name: {text}"


def _open_bank(rental: Rental) -> None:
    """Let the renter's bank work in `bank`, and return when some steps are done."""
    program = _lay_down(rental, bank)
    rental.ssh(f"nohup python3 {program} run bank >/dev/null 2>&1 </dev/null & echo")
    _wait_beyond(rental, "000000000005\n")
    rental.ssh(BALLAST)


def _wait_beyond(rental: Rental, step: str) -> None:
    """Wait until the bank is beyond this step. A step waits for the disk, which a snapshot may use for seconds."""
    wait_until(lambda: rental.ssh("cat bank/zz_B").stdout > step, "the bank works", BANK_S)


async def test_the_files_of_every_periodic_snapshot_existed_together(real: RealSnapshotService, rental: Rental) -> None:
    await asyncio.to_thread(_open_bank, rental)
    steps, torn = set(), []
    for _ in range(6):
        copy = (await real.client.take(home_of(rental), ROOMY)).snapshot
        kept = real.copy_of(home_of(rental), str(copy.id)) / "bank"
        torn += [f"copy {copy.id}: {fault}" for fault in bank.faults(kept)]
        step = (kept / "zz_B").read_text()
        steps.add(step)
        await asyncio.to_thread(_wait_beyond, rental, step)
    assert not torn, "\n".join(torn)
    assert len(steps) > 3, "the bank continued between the snapshots"


async def test_the_files_of_a_recovered_snapshot_existed_together(real: RealSnapshotService, rental: Rental) -> None:
    await asyncio.to_thread(_open_bank, rental)
    recovered = (await real.client.recover(home_of(rental), ROOMY)).snapshot
    assert bank.faults(real.copy_of(home_of(rental), str(recovered.id)) / "bank") == []


async def test_files_restored_on_another_worker_existed_together_and_the_program_continues(
    real: RealSnapshotService, rental: Rental, neighbour: Worker
) -> None:
    await asyncio.to_thread(_open_bank, rental)
    await real.client.take(home_of(rental), ROOMY)
    there = await migrate(real, rental, neighbour)
    program = await asyncio.to_thread(_lay_down, there, bank)
    checked = await asyncio.to_thread(there.ssh, f"python3 {program} check bank && python3 {program} run bank 3")
    assert (checked.returncode, checked.stdout) == (0, "[]\n"), checked.stdout + checked.stderr
