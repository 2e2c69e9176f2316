"""Which processes are stopped and which resist, by the kernel's tables. Real processes: tests/integration."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
from orion_worker.freezer.stopper import KernelTask, all_at_rest, any_resists, any_woken, parents, parse_task
from orion_worker.system import processes

STAT = "42 (a) R (b) T 1 42 42 0 -1 4194304 97 0 0 0 3 4 0 0 20 0 1 0 777 2510848 200 18446744073709551615"
STATUS = (
    "Name:\ta) R (b\nState:\tT (stopped)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000040000\n"
    "voluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t6\n"
)
TASK = KernelTask(pid=42, tid=42, parent=1, started=777, state="T", stopping=False, turns=(5, 6, 7))


def by_key(*tasks: KernelTask) -> dict[tuple[int, int, int], KernelTask]:
    return {task.key: task for task in tasks}


def test_a_task_is_parsed_whatever_name_the_renter_gave_it() -> None:
    assert parse_task(42, STAT, STATUS) == replace(TASK, stopping=True)


def test_all_are_stopped_when_no_task_can_run_before_it_stops() -> None:
    assert all_at_rest([TASK, replace(TASK, state="Z"), replace(TASK, state="D"), replace(TASK, state="t")])
    assert not all_at_rest([TASK, replace(TASK, state="S")])
    assert not all_at_rest([replace(TASK, state="R")])


def test_a_task_that_runs_again_after_a_signal_resists_and_one_that_got_no_turn_waits() -> None:
    running = replace(TASK, state="R")
    assert any_resists(by_key(running), [replace(running, turns=(5, 7, 9))])
    assert not any_resists(by_key(running), [running])
    assert not any_resists(by_key(running), [replace(running, turns=(5, 7, 9), stopping=True)]), (
        "the process is about to stop"
    )
    assert not any_resists(by_key(running), [replace(running, state="T", turns=(6, 6, 7))])
    assert not any_resists({}, [running]), "the process is new: the next check decides"


def test_a_task_that_ran_since_it_was_seen_stopped_was_woken_even_if_it_is_stopped_again() -> None:
    assert any_woken(by_key(TASK), [replace(TASK, turns=(6, 6, 7))])
    assert any_woken(by_key(TASK), [replace(TASK, state="S", turns=(6, 6, 7))])
    assert not any_woken(by_key(TASK), [TASK])
    assert not any_woken(by_key(replace(TASK, state="D")), [replace(TASK, turns=(6, 6, 7))]), (
        "the process ran again and stopped"
    )
    assert not any_woken(by_key(TASK), [replace(TASK, started=778, turns=(6, 6, 7))]), (
        "its pid belongs to another process now"
    )


def test_parents_are_stopped_before_their_children_and_the_oldest_first() -> None:
    def process(pid: int, parent: int, started: int) -> KernelTask:
        return replace(TASK, pid=pid, tid=pid, parent=parent, started=started)

    outer, inner, leaf = process(70, 1, 100), process(50, 70, 200), process(60, 50, 200)
    thread = replace(leaf, tid=61, parent=99)
    assert parents([leaf, thread, inner, outer]) == [70, 50]
    assert parents([leaf]) == []


def test_a_process_whose_first_thread_has_ended_still_counts() -> None:
    zombie = "State:\tZ (zombie)\nUid:\t100001\t100001\t100001\t100001\nThreads:\t{}\n"
    assert processes.owners(zombie.format(1)) == set()
    assert processes.owners(zombie.format(2)) == {100_001}


def test_the_parent_is_read_from_the_status() -> None:
    assert processes.parent_of("Name:\tx\nPPid:\t17\n") == 17
    assert processes.parent_of("") == 0


def test_a_stopper_that_is_stopped_itself_continues_and_its_caller_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fence's own strike does this while a frozen rental is purged."""
    kill = os.kill

    def stopped_first(pid: int, number: int) -> None:
        kill(os.getpid() if pid == -1 else pid, signal.SIGSTOP if pid == -1 else number)

    monkeypatch.setattr(os, "kill", stopped_first)
    assert processes.signal_all(4_100_000_000, signal.SIGTERM)
