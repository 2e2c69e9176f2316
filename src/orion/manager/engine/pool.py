"""The engine's jobs: at most so many children at once, the rest in order of arrival, each bounded by its deadline."""

from __future__ import annotations

import logging
import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import ValidationError

from orion.manager.engine import children
from orion.manager.engine.protocol import MAX_LINE_BYTES, JobLine, OutcomeLine

READ_BYTES = 1 << 16

log = logging.getLogger("orion.engine")

RunPlaybook = Callable[[JobLine, float], OutcomeLine]
"""Runs one job, in a child. The second argument: the wall clock's time after which the worker must refuse it."""
Answer = Callable[[OutcomeLine], None]


@dataclass(eq=False)
class Run:
    """One job, from its receipt to its answer."""

    job: JobLine
    owner: object
    answer: Answer
    received: float
    child: children.Child | None = None
    result: bytearray = field(default_factory=bytearray)
    late: bool = False

    @property
    def deadline(self) -> float:
        return self.received + self.job.deadline_s


class Pool:
    """`step` after each event; `patience` says for how long nothing will need a step unless an event comes."""

    def __init__(self, selector: selectors.BaseSelector, run_playbook: RunPlaybook, most_children: int) -> None:
        self._selector = selector
        self._run_playbook = run_playbook
        self._most_children = most_children
        self._waiting: deque[Run] = deque()
        self._running: dict[int, Run] = {}

    def submit(self, job: JobLine, owner: object, answer: Answer) -> None:
        """The job is answered once, unless its owner is abandoned before."""
        if any(run.owner is owner and run.job.id == job.id for run in (*self._waiting, *self._running.values())):
            answer(OutcomeLine(id=job.id, ok=False, message="a job with this id is already in work"))
            return
        self._waiting.append(Run(job, owner, answer, time.monotonic()))

    def abandon(self, owner: object) -> None:
        """Kill the owner's jobs; they are not answered."""
        self._waiting = deque(run for run in self._waiting if run.owner is not owner)
        for pid, run in self._running.items():
            if run.owner is owner:
                run.answer = lambda _: None
                children.kill(pid)

    def kill_all(self) -> None:
        self._waiting.clear()
        for pid in self._running:
            children.kill(pid)

    def patience(self) -> float | None:
        deadlines = [run.deadline for run in (*self._waiting, *self._running.values()) if not run.late]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def step(self) -> None:
        self._reap()
        self._end_late_ones(time.monotonic())
        while self._waiting and len(self._running) < self._most_children:
            self._start(self._waiting.popleft())

    def _start(self, run: Run) -> None:
        refused_after = time.time() + run.deadline - time.monotonic()
        work = self._run_playbook

        def in_child() -> bytes:
            return work(run.job, refused_after).model_dump_json().encode()

        try:
            child = children.start(in_child)
        except OSError as error:
            run.answer(OutcomeLine(id=run.job.id, ok=False, message=f"the engine cannot start a process: {error}"))
            return
        run.child = child
        self._running[child.pid] = run
        self._selector.register(child.pipe, selectors.EVENT_READ, lambda _: self._read(run, child))

    def _read(self, run: Run, child: children.Child) -> None:
        """A child that says too much is cut off; what is left of its answer is then no answer."""
        with suppress(BlockingIOError):
            while part := os.read(child.pipe, READ_BYTES):
                run.result += part
                if len(run.result) > MAX_LINE_BYTES:
                    children.kill(child.pid)
                    break
            self._selector.unregister(child.pipe)

    def _reap(self) -> None:
        for pid in list(self._running):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._finish(self._running.pop(pid))

    def _finish(self, run: Run) -> None:
        assert run.child  # noqa: S101 - only what was started ends
        if run.child.pipe in self._selector.get_map():
            self._read(run, run.child)
        with suppress(KeyError):
            self._selector.unregister(run.child.pipe)
        os.close(run.child.pipe)
        outcome = _outcome(run)
        log.info(
            "%s of %s on %s: %s in %.2f s%s",
            run.job.action,
            run.job.vars.rental_id,
            run.job.host.worker_id,
            "done" if outcome.ok else "failed",
            time.monotonic() - run.received,
            f" ({outcome.message})" if outcome.message else "",
        )
        run.answer(outcome)

    def _end_late_ones(self, now: float) -> None:
        for run in [run for run in self._waiting if run.deadline <= now]:
            self._waiting.remove(run)
            run.answer(OutcomeLine(id=run.job.id, ok=False, message=f"{_timed_out(run)}, waiting for its turn"))
        for pid, run in self._running.items():
            if not run.late and run.deadline <= now:
                run.late = True
                children.kill(pid)


def _outcome(run: Run) -> OutcomeLine:
    if run.late:
        return OutcomeLine(id=run.job.id, ok=False, message=_timed_out(run))
    try:
        return OutcomeLine.model_validate_json(bytes(run.result[:MAX_LINE_BYTES]))
    except ValidationError:
        return OutcomeLine(id=run.job.id, ok=False, message="the engine's process for this job ended without a result")


def _timed_out(run: Run) -> str:
    return f"timed out after {run.job.deadline_s:g} s"
