"""How long a job waits for a worker, what it accepts as an answer, and when it gives up a transfer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from orion_worker.snapshots.requests import MAX_REQUEST_BYTES

from orion.manager.snapshots import transfer, worker_command
from orion.manager.snapshots.lifetime import Lifetime
from orion.manager.snapshots.port import SnapshotError
from orion.manager.snapshots.transfer import StallClock, Transfer
from orion.manager.snapshots.worker_command import MAX_FOLDER_MODES_BYTES, SnapshotAnswer, WorkerCommand

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="ssh runs as an account of its own")


@pytest.fixture
def lifetime() -> Iterator[Lifetime]:
    client, far_end = socket.socketpair()
    with client, far_end:
        yield Lifetime(client, 300.0)


def answer_of(shell: str, lifetime: Lifetime) -> dict[str, object]:
    """Return the answer of a program in the place of ssh."""
    with WorkerCommand(
        ssh=["sh", "-c", shell], uid=0, environment={"PATH": "/usr/bin:/bin"}, command="send", request={}
    ) as worker:
        return worker.read_answer(lifetime)


def test_a_worker_that_is_not_reached_is_given_up_long_before_the_job_s_deadline(
    lifetime: Lifetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_command, "REACHED_WITHIN_S", 0.05)
    with pytest.raises(SnapshotError, match=r"no answer within 0\.05 s") as refused:
        answer_of("exec sleep 300", lifetime)
    assert refused.value.code == "unreachable"
    assert lifetime.left_s > 200


def test_a_worker_that_was_reached_may_take_its_time_to_answer(
    lifetime: Lifetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    wait_for = lifetime.wait_for

    def noted(descriptor: int, within_s: float = float("inf")) -> bool:
        waits.append(within_s)
        return wait_for(descriptor, within_s)

    monkeypatch.setattr(lifetime, "wait_for", noted)
    assert answer_of('echo; read -r request; echo \'{"ok": true, "same": true}\'', lifetime)["same"] is True
    assert waits[0] == worker_command.REACHED_WITHIN_S
    assert set(waits[1:]) == {float("inf")}


def test_an_answer_without_a_first_line_is_accepted(lifetime: Lifetime) -> None:
    assert answer_of("read -r request; echo '{\"ok\": true}'", lifetime) == {"ok": True}


RSYNC = """
import array, os, socket, sys
asked, answered = socket.socketpair(), socket.socketpair()
ends = array.array("i", [asked[1].fileno(), answered[1].fileno()])
socket.socket(fileno=int(sys.argv[1])).sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ends)])
asked[1].close(), answered[1].close()
try:
    while True:
        os.write(asked[0].fileno(), bytes(1 << 16))
except OSError:
    sys.exit(12)
"""
"""A program that writes everything before it reads, as an rsync that does not notice the end of its peer."""


@contextmanager
def local_rsync(program: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """Start a program in the place of the local rsync; give it and the socket over which it passes its pipes."""
    mine, theirs = socket.socketpair()
    rsync = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs.fileno())],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(theirs.fileno(),), bufsize=0,
    )  # fmt: skip
    theirs.close()
    try:
        yield rsync, mine
    finally:
        rsync.kill()
        rsync.wait()
        mine.close()


@pytest.mark.parametrize("program", ["exit", "exec >/dev/null; exec sleep 300"])
def test_an_rsync_that_still_writes_ends_with_the_connection_to_its_worker(program: str, lifetime: Lifetime) -> None:
    with (
        local_rsync(RSYNC) as (rsync, control),
        WorkerCommand(
            ssh=["sh", "-c", program], uid=0, environment={"PATH": "/usr/bin:/bin"}, command="receive", request={}
        ) as worker,
    ):
        lifetime._ends_at = time.monotonic() + 20.0
        Transfer(worker=worker, uid=0, lifetime=lifetime, max_files=1e9, max_bytes=1e9, low_priority=False)._carry(
            rsync, control, lambda: None
        )
        assert rsync.wait(20) == 12


STILL = RSYNC.replace("while True", "if True").replace("sys.exit(12)", "pass") + "import time; time.sleep(300)"
"""A program that writes once and is then stopped, as an rsync of a hostile renter."""


@pytest.fixture
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "LOOK_EVERY_S", 0.02)


def test_a_transfer_without_progress_is_given_up_long_before_the_job_s_deadline(
    lifetime: Lifetime, looking_often: None
) -> None:
    with (
        local_rsync(STILL) as (rsync, control),
        WorkerCommand(
            ssh=["sh", "-c", "cat >/dev/null"],
            uid=0,
            environment={"PATH": "/usr/bin:/bin"},
            command="receive",
            request={},
        ) as worker,
    ):
        standing = Transfer(
            worker=worker, uid=0, lifetime=lifetime, max_files=1e9, max_bytes=1e9, low_priority=False, stalled_s=0.3
        )
        with pytest.raises(SnapshotError, match="nothing of its files has come or gone") as refused:
            standing._carry(rsync, control, lambda: None)
    assert refused.value.code == "stalled"
    assert lifetime.left_s > 200


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (STILL.replace("time.sleep(300)", "[sum(range(10000)) for _ in range(40000)]"), "cat >/dev/null"),
        (STILL, "while sleep 0.05; do echo . >&2; done"),
    ],
    ids=["this side works", "the worker says that it does"],
)
def test_a_transfer_in_which_one_side_computes_goes_on_without_transferred_bytes(
    lifetime: Lifetime, looking_often: None, here: str, there: str
) -> None:
    with (
        local_rsync(here) as (rsync, control),
        WorkerCommand(
            ssh=["sh", "-c", there], uid=0, environment={"PATH": "/usr/bin:/bin"}, command="receive", request={}
        ) as worker,
    ):
        lifetime._ends_at = time.monotonic() + 1.5
        working = Transfer(
            worker=worker, uid=0, lifetime=lifetime, max_files=1e9, max_bytes=1e9, low_priority=False, stalled_s=0.5
        )
        with pytest.raises(SnapshotError) as refused:
            working._carry(rsync, control, lambda: None)
    assert refused.value.code == "timed_out", "by the deadline of the job"


def test_a_transfer_is_idle_when_no_side_works_while_this_process_runs() -> None:
    idle = StallClock(10.0)
    assert not any(idle.is_too_long(0, float(now)) for now in range(10))
    assert not idle.is_too_long(1, 10.0), "something was done in the last second"
    assert not idle.is_too_long(1, 500.0), "this process was stopped meanwhile"
    assert [idle.is_too_long(1, 500.0 + now) for now in range(1, 10)] == [*[False] * 8, True]


def test_an_answer_of_the_largest_honest_length_is_accepted(lifetime: Lifetime) -> None:
    skipped = json.dumps(["\N{GRINNING FACE}" * 200] * 20)
    assert len(skipped) > 48_000
    answer = f'{{"ok": true, "skipped": {skipped}}}'.replace("\\", "\\\\")
    assert len(list(answer_of(f"echo; read -r request; printf '{answer}\n'", lifetime)["skipped"])) == 20  # type: ignore[call-overload]


def test_an_answer_that_is_nested_too_deeply_is_refused(lifetime: Lifetime) -> None:
    with pytest.raises(SnapshotError, match="its answer is not one"):
        answer_of("echo; read -r request; head -c 90000 /dev/zero | tr '\\0' '['; echo", lifetime)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("../escape", 448),
        (b"/etc".hex(), 448),
        (b"./../x".hex(), 448),
        (b".//x".hex(), 448),
        (b"./\0".hex(), 448),
        (b"./n".hex().upper(), 448),
        (b"./x".hex(), 1 << 40),
        (b"./x".hex(), -1),
        (b"./x".hex(), float("inf")),
        (b"./x".hex(), None),
    ],
)
def test_a_worker_s_answer_with_modes_that_no_worker_would_accept_is_refused(path: str, mode: float) -> None:
    """A restore of that snapshot would fail."""
    good = {b".".hex(): 0o300, b"./a\n\xff".hex(): 0o7300}
    assert SnapshotAnswer.of({"folders": good}).folders == good
    with pytest.raises(SnapshotError):
        SnapshotAnswer.of({"folders": good | {path: mode}})


def test_all_modes_that_are_kept_fit_into_a_request_to_a_worker() -> None:
    many = {f"./{number:08}".encode().hex(): 0o300 for number in range(5000)}
    with pytest.raises(SnapshotError):
        SnapshotAnswer.of({"folders": many})
    assert MAX_FOLDER_MODES_BYTES <= MAX_REQUEST_BYTES // 2
