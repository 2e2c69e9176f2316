"""How long the vault waits for a worker: to be reached, and then for its answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from orion.manager.engine.vault import transfer
from orion.manager.engine.vault.port import VaultError
from orion.manager.engine.vault.transfer import Far, Idle, Transfer
from orion.manager.engine.vault.watch import Watch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="ssh runs as an account of its own")


@pytest.fixture
def watch() -> Iterator[Watch]:
    asker, client = socket.socketpair()
    with asker, client:
        yield Watch(asker, 300.0)


def heard(shell: str, watch: Watch) -> dict[str, object]:
    """What is heard from a program in the place of ssh."""
    with Far(["sh", "-c", shell], (0, 0), {"PATH": "/usr/bin:/bin"}, "send", {}) as far:
        return far.hear(watch)


def test_a_worker_that_is_not_reached_is_given_up_long_before_the_job_s_deadline(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "REACHED_WITHIN_S", 0.05)
    with pytest.raises(VaultError, match=r"no answer within 0\.05 s") as refused:
        heard("exec sleep 300", watch)
    assert refused.value.code == "unreachable"
    assert watch.left_s > 200


def test_a_worker_that_was_reached_may_take_its_time_to_answer(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    wait_for = watch.wait_for

    def noted(descriptor: int, within_s: float = float("inf")) -> bool:
        waits.append(within_s)
        return wait_for(descriptor, within_s)

    monkeypatch.setattr(watch, "wait_for", noted)
    assert heard('echo; read -r request; echo \'{"ok": true, "same": true}\'', watch)["same"] is True
    assert waits[0] == transfer.REACHED_WITHIN_S
    assert set(waits[1:]) == {float("inf")}


def test_an_answer_without_a_word_before_it_is_heard_too(watch: Watch) -> None:
    assert heard("read -r request; echo '{\"ok\": true}'", watch) == {"ok": True}


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
"""As an rsync that first writes all that it has, and then would read that nobody answers any more."""


@contextmanager
def local_rsync(program: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A program in the place of the rsync here, and the socket by which it hands over its ends."""
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


@pytest.mark.parametrize("worker", ["exit", "exec >/dev/null; exec sleep 300"])
def test_an_rsync_that_still_writes_ends_with_the_connection_to_its_worker(worker: str, watch: Watch) -> None:
    with (
        local_rsync(RSYNC) as (rsync, control),
        Far(["sh", "-c", worker], (0, 0), {"PATH": "/usr/bin:/bin"}, "receive", {}) as far,
    ):
        watch._ends_at = time.monotonic() + 20.0
        Transfer(far, 0, watch, 1e9, 1e9, gently=False)._carry(rsync, control, lambda: None)
        assert rsync.wait(20) == 12


STILL = RSYNC.replace("while True", "if True").replace("sys.exit(12)", "pass") + "import time; time.sleep(300)"
"""As an rsync that writes once, and then is stopped."""


@pytest.fixture
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "LOOK_EVERY_S", 0.02)


def test_a_transfer_in_which_nothing_moves_is_given_up_long_before_the_job_s_deadline(
    watch: Watch, looking_often: None
) -> None:
    with (
        local_rsync(STILL) as (rsync, control),
        Far(["sh", "-c", "cat >/dev/null"], (0, 0), {"PATH": "/usr/bin:/bin"}, "receive", {}) as far,
    ):
        standing = Transfer(far, 0, watch, 1e9, 1e9, gently=False, stalled_s=0.3)
        with pytest.raises(VaultError, match="nothing of its files has come or gone") as refused:
            standing._carry(rsync, control, lambda: None)
    assert refused.value.code == "stalled"
    assert watch.left_s > 200


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (STILL.replace("time.sleep(300)", "[sum(range(10000)) for _ in range(40000)]"), "cat >/dev/null"),
        (STILL, "while sleep 0.05; do echo . >&2; done"),
    ],
    ids=["this side works", "the worker says that it does"],
)
def test_a_transfer_in_which_one_side_works_goes_on_though_nothing_moves(
    watch: Watch, looking_often: None, here: str, there: str
) -> None:
    with (
        local_rsync(here) as (rsync, control),
        Far(["sh", "-c", there], (0, 0), {"PATH": "/usr/bin:/bin"}, "receive", {}) as far,
    ):
        watch._ends_at = time.monotonic() + 1.5
        working = Transfer(far, 0, watch, 1e9, 1e9, gently=False, stalled_s=0.5)
        with pytest.raises(VaultError) as refused:
            working._carry(rsync, control, lambda: None)
    assert refused.value.code == "timed_out", "by the deadline of the job"


def test_a_transfer_is_idle_while_nothing_is_done_and_this_process_runs() -> None:
    idle = Idle(10.0)
    assert not any(idle.is_too_long(0, float(now)) for now in range(10))
    assert not idle.is_too_long(1, 10.0), "something was done in the last second"
    assert not idle.is_too_long(1, 500.0), "this process was stopped meanwhile"
    assert [idle.is_too_long(1, 500.0 + now) for now in range(1, 10)] == [*[False] * 8, True]
