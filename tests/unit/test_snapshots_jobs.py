"""The work of a snapshot service's job around a transfer: checks of the disk and the owner's share, and clean-up.

The worker here answers that the home is the same as the last snapshot, or fails. Transfers are in tests/integration.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.builders import host_key

from orion.manager.domain.snapshots import BLOCK_BYTES
from orion.manager.messages import HostMessage
from orion.manager.snapshots import jobs
from orion.manager.snapshots.disk import Disk, Usage
from orion.manager.snapshots.jobs import Directories, SnapshotJob
from orion.manager.snapshots.lifetime import Lifetime
from orion.manager.snapshots.port import OVER_SHARE, SnapshotError
from orion.manager.snapshots.protocol import SnapshotAction, SnapshotReply, SnapshotRequest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acting under other uids needs root; CI is root")

HOST = HostMessage(worker_id="w-one", address="192.0.2.1", host_keys=(host_key(1),))  # type: ignore[arg-type]
SAME = '{"ok": true, "same": true}'
OTHER = '{"ok": true}'
UID = 1_900_000_000 + os.getpid()
"""One uid for each process of tests: a job kills all that runs under its rental's uid, in other test runs too."""
A_COPY = Usage(1, BLOCK_BYTES)
"""The disk use of a snapshot of an empty home."""


@dataclass
class JobBench:
    """Runs jobs in a directory of their own, with a worker that gives a fixed answer."""

    directories: Directories
    monkeypatch: pytest.MonkeyPatch

    @property
    def begun(self) -> Path:
        """Return the file with the Unix time at which the worker read the request."""
        return self.directories.copies.parent / "begun"

    def has(self, size: Usage, used: Usage) -> None:
        """Set the size and use of the disk."""
        self.monkeypatch.setattr(Disk, "of", lambda _: Disk(size, used))

    def take(
        self, rental_id: str, epoch: int, action: SnapshotAction = SnapshotAction.COPY, says: str = SAME, **more: str
    ) -> SnapshotReply:
        """Run a job with a worker that gives this answer. Each epoch makes a snapshot of its own."""
        program = f"read -r request; date +%s.%N >{self.begun}; echo; echo '{says}'"
        self.monkeypatch.setattr(jobs, "worker_ssh", lambda *_: ["sh", "-c", program])
        request = SnapshotRequest(
            action=action, rental_id=rental_id, uid=UID, epoch=epoch, host=HOST, deadline_s=20.0,
            max_files=100, max_bytes=1 << 20, owner_share=0.5, **{"owner": "ann"} | more,
        )  # fmt: skip
        client, far_end = socket.socketpair()
        with client, far_end:
            job = SnapshotJob(request, self.directories, Lifetime(client, 20.0))
            try:
                return job.run()
            finally:
                job.tidy()

    def kept(self, rental_id: str) -> set[str]:
        place = self.directories.copies / rental_id
        return {each.name for each in place.iterdir()} if place.exists() else set()


@pytest.fixture
def snapshot_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobBench]:
    folder = Path(tempfile.mkdtemp(prefix="orion-"))
    folder.chmod(0o711)
    for name in ("copies", "run", "run/locks", "run/ssh"):
        (folder / name).mkdir(mode=0o711)
    snapshot_service = JobBench(Directories(folder / "copies", folder / "run", 0), monkeypatch)
    snapshot_service.has(Usage(1000, 1000 * BLOCK_BYTES), Usage(0, 0))
    yield snapshot_service
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("used", "scarce"), [(Usage(100, 901 * BLOCK_BYTES), "bytes"), (Usage(901, 100 * BLOCK_BYTES), "inodes")]
)
def test_no_snapshot_is_begun_on_a_disk_with_hardly_any_free_bytes_or_inodes(
    snapshot_service: JobBench, used: Usage, scarce: str
) -> None:
    snapshot_service.has(Usage(1000, 1000 * BLOCK_BYTES), used)
    with pytest.raises(SnapshotError, match=f"nearly full: it has hardly any {scarce} left") as refused:
        snapshot_service.take("one", 1)
    assert refused.value.code == "disk_full"
    assert snapshot_service.kept("one") == set()


def room_for(snapshot_service: JobBench, copies: int) -> None:
    snapshot_service.has(Usage(2 * copies, 2 * copies * BLOCK_BYTES + 100), Usage(0, 0))


def test_an_owner_beyond_its_share_loses_older_snapshots_and_then_gets_no_new_one(
    snapshot_service: JobBench,
) -> None:
    room_for(snapshot_service, 3)
    for epoch in range(1, 5):
        snapshot_service.take("one", epoch)
    assert snapshot_service.kept("one") == {"2-1", "3-1", "4-1"}
    with pytest.raises(SnapshotError, match="would take more than 50% of the manager's disk") as refused:
        snapshot_service.take("two", 1)
    assert refused.value.code == OVER_SHARE
    assert snapshot_service.kept("two") == set()
    assert snapshot_service.kept("one") == {"2-1", "3-1", "4-1"}
    assert snapshot_service.take("three", 1, owner="bob").ok
    assert snapshot_service.take("one", 4).copies[0]["generation"] == "4-1", (
        "the home is unchanged, and room is made all the same"
    )
    assert snapshot_service.kept("one") == {"incoming", "4-1"}
    assert snapshot_service.take("two", 1).ok


def test_an_owner_is_listed_as_short_of_room_until_a_rental_is_removed(snapshot_service: JobBench) -> None:
    room_for(snapshot_service, 1)
    snapshot_service.take("one", 1)
    with pytest.raises(SnapshotError):
        snapshot_service.take("two", 1)
    assert snapshot_service.take("-", 1, SnapshotAction.SHORT_OF_ROOM).owners == ["ann"]
    assert snapshot_service.take("-", 1, SnapshotAction.RENTALS).rentals == ["one", "two"]
    snapshot_service.take("one", 1, SnapshotAction.REMOVE)
    assert snapshot_service.take("two", 1).ok
    assert snapshot_service.take("-", 1, SnapshotAction.SHORT_OF_ROOM).owners == []


def test_no_snapshot_is_received_for_an_owner_whose_other_rentals_use_all_of_its_share(
    snapshot_service: JobBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(snapshot_service, 1)
    snapshot_service.take("one", 1)
    monkeypatch.setattr(SnapshotJob, "_receive", lambda *_: pytest.fail("it was received"))
    with pytest.raises(SnapshotError) as refused:
        snapshot_service.take("two", 1, says=OTHER)
    assert refused.value.code == OVER_SHARE


def test_the_snapshot_that_will_be_restored_is_not_removed_to_make_room(snapshot_service: JobBench) -> None:
    room_for(snapshot_service, 3)
    for epoch in range(1, 5):
        snapshot_service.take("one", epoch)
    with pytest.raises(SnapshotError):
        snapshot_service.take("two", 1)
    snapshot_service.take("one", 4, generation="2-1")
    assert snapshot_service.kept("one") == {"incoming", "2-1", "4-1"}


def test_a_recovered_snapshot_equal_to_an_old_snapshot_keeps_that_one(snapshot_service: JobBench) -> None:
    room_for(snapshot_service, 3)
    for epoch in range(1, 4):
        snapshot_service.take("one", epoch)
    with pytest.raises(SnapshotError):
        snapshot_service.take("two", 1)
    assert snapshot_service.take("one", 2, SnapshotAction.RECOVER).done
    assert "2-1" in snapshot_service.kept("one")


@pytest.mark.parametrize(
    ("after", "counted_s"), [("", 0.0), (', "after_s": 0.001', 0.001), (', "after_s": -1e300', 0.0)]
)
def test_no_snapshot_has_a_later_time_than_its_begin(snapshot_service: JobBench, after: str, counted_s: float) -> None:
    """The answer arrives later than it was sent, and files that were written meanwhile are not in the snapshot."""
    asked_at = time.time()
    done = snapshot_service.take("one", 1, says=f'{{"ok": true, "same": true, "age_s": 0{after}}}').done
    assert done is not None
    assert asked_at + counted_s <= done["at"] <= float(snapshot_service.begun.read_text()) + counted_s


def test_a_worker_that_reports_a_late_begin_makes_no_snapshot_of_a_future_time(snapshot_service: JobBench) -> None:
    done = snapshot_service.take("one", 1, says='{"ok": true, "same": true, "after_s": 1e300}').done
    assert done is not None
    assert done["at"] <= time.time()


def test_a_failed_snapshot_leaves_no_files(snapshot_service: JobBench, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(job: SnapshotJob, *_: object) -> None:
        (job._folder / "incoming/home/large").write_bytes(bytes(100_000))
        raise SnapshotError("stalled", "nothing comes any more")

    snapshot_service.take("one", 1)
    monkeypatch.setattr(SnapshotJob, "_receive", receive)
    with pytest.raises(SnapshotError, match="nothing comes"):
        snapshot_service.take("one", 2, says=OTHER)
    assert snapshot_service.kept("one") == {"1-1"}
