"""The engine's queue of jobs. It puts waiting jobs into batches and gives them to a limited number of runners.

A failing worker or run does not delay the others: a run that takes too long is killed, and its unanswered jobs are
tried once more, each alone. A worker that failed lately stays out of batches, and domain/fair_share.py limits the
runners that a single worker can block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from math import inf
from selectors import BaseSelector

from orion.manager.ansible import runners
from orion.manager.ansible.batches import WaitingJob, choose
from orion.manager.ansible.connections import Connections, State, WorkerConnection
from orion.manager.ansible.protocol import UNREACHABLE, BatchMessage, BatchOrder, HostOrders, JobMessage, OutcomeMessage
from orion.manager.ansible.protocol import ResultMessage as Result
from orion.manager.ansible.runners import Play
from orion.manager.channel import ChannelError, SelectorChannel, decode_as
from orion.manager.domain.fair_share import Claim
from orion.manager.messages import HostMessage
from orion.manager.queues import FairQueue

PATIENCE_S = 5.0
"""Seconds after which a run over several workers is killed, plus a quarter for each rental of its busiest worker. The
end of its connection mostly shows earlier that a worker hangs."""
SUSPECT_S = 60.0
"""Seconds for which a worker that failed stays out of batches, unless a job there succeeds meanwhile."""
BATCHES_PER_RUNNER = 500
NO_RESULT = "the engine's process for this job ended without a result"

log = logging.getLogger("orion.engine")

Answer = Callable[[OutcomeMessage], None]


@dataclass(eq=False, kw_only=True)
class Run:
    """One job, from its receipt to its answer."""

    number: int
    job: JobMessage
    peer: object
    """The client that sent the job."""
    answer: Answer
    received: float
    refused_after: float
    alone: bool = False
    """Whether the job was in a run that failed, so that it is tried once more in a run of its own."""
    connection: WorkerConnection | None = None

    @property
    def deadline(self) -> float:
        return self.received + self.job.deadline_s


@dataclass(eq=False, kw_only=True)
class Runner:
    """A process that plays batches, and its current batch."""

    pid: int
    channel: SelectorChannel
    runs: dict[int, Run] = field(default_factory=dict)
    """The unanswered jobs of its batch, by number."""
    given_up_at: float = inf
    """The monotonic second at which it is killed because its batch for several workers takes too long."""
    busy: bool = False
    is_one_job: bool = False
    killed: bool = False
    claim: Claim | None = None
    """The claim that it was started under, if its batch is for one worker."""
    played: int = 0


class Pool:
    """The waiting jobs and the runners. Call `step` after each event, and when `patience` seconds have passed."""

    def __init__(
        self, *, selector: BaseSelector, play: Play, most_runners: int, connections: Connections, patience_s: float
    ) -> None:
        self._selector = selector
        self._play = play
        self._most_runners = most_runners
        self._shares = FairQueue(most_runners)
        self._connections = connections
        self._patience_s = patience_s
        self._numbers = count(1)
        self._waiting: list[Run] = []
        self._runners: dict[int, Runner] = {}
        self._suspects: dict[HostMessage, float] = {}
        """The monotonic second until which each worker that failed stays out of batches."""

    def submit(self, job: JobMessage, peer: object, answer: Answer) -> None:
        """Queue a job. It is answered once, unless `abandon` is called for its peer before."""
        if any(run.peer is peer and run.job.id == job.id for run in self._all()):
            answer(OutcomeMessage(id=job.id, ok=False, message="a job with this id is already in work"))
            return
        now = time.monotonic()
        self._waiting.append(
            Run(
                number=next(self._numbers),
                job=job,
                peer=peer,
                answer=answer,
                received=now,
                refused_after=time.time() + job.deadline_s,
            )
        )

    def abandon(self, peer: object) -> None:
        """Drop the peer's jobs without an answer, and kill each run that has no other jobs."""
        self._waiting = [run for run in self._waiting if run.peer is not peer]
        for runner in self._runners.values():
            others = {number: run for number, run in runner.runs.items() if run.peer is not peer}
            if runner.runs and not others:
                self._kill(runner)
            runner.runs = others

    def kill_all(self) -> None:
        self._waiting.clear()
        for pid in self._runners:
            runners.kill(pid)

    def patience(self) -> float | None:
        """Return the seconds until a deadline needs a step; None if there is no deadline."""
        deadlines = [run.deadline for run in self._all()]
        deadlines += [r.given_up_at for r in self._runners.values() if r.given_up_at < inf and not r.killed]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def prepare(self) -> None:
        """Start one runner before it is needed."""
        if not self._runners:
            self._start_runner()

    @property
    def pids(self) -> Iterable[int]:
        return self._runners.keys()

    def reaped(self, pid: int) -> bool:
        """Return whether the process that ended was a runner. Its unanswered jobs are tried again or answered."""
        if pid not in self._runners:
            return False
        self._runners[pid].channel.drain()
        runner = self._runners.pop(pid)
        runner.channel.close()
        self._give_back(runner)
        for run in runner.runs.values():
            self._try_again(run, NO_RESULT, may_retry=runner.killed or not runner.is_one_job)
        return True

    def step(self) -> None:
        now = time.monotonic()
        self._end_late_ones(now)
        self._end_stragglers(now)
        self._suspects = {host: until for host, until in self._suspects.items() if until > now}
        while self._start_a_batch():
            pass

    def _all(self) -> Iterable[Run]:
        yield from self._waiting
        for runner in self._runners.values():
            yield from runner.runs.values()

    def _start_a_batch(self) -> bool:
        ready = [run for run in list(self._waiting) if self._is_connected(run)]
        chosen = set(choose([self._as_waiting(run) for run in ready], self._shares.may))
        runner = self._free_runner() if chosen else None
        if runner is None:
            return False
        self._waiting = [run for run in self._waiting if run.number not in chosen]
        self._assign(runner, [run for run in ready if run.number in chosen])
        return True

    def _as_waiting(self, run: Run) -> WaitingJob:
        job = run.job
        return WaitingJob(
            number=run.number,
            action=job.action,
            host=job.host,
            alone=run.alone,
            suspect=job.host in self._suspects,
            owner=job.owner,
        )

    def _is_connected(self, run: Run) -> bool:
        """Return whether the job can start now. Answer it if its worker cannot be reached."""
        if run.connection and run.connection.state is State.CLOSED:
            if not run.connection.was_open:
                self._suspect(run.job.host)
                self._finish(run, Result(ok=False, message=f"{UNREACHABLE}{run.connection.complaint}"))
                return False
            run.connection = None  # it broke before it was used, so a new one is opened
        if run.connection is None:
            try:
                run.connection = self._connections.to(run.job.host)
            except OSError as error:
                self._finish(run, Result(ok=False, message=f"the engine cannot start a process: {error}"))
                return False
        return run.connection.state is State.OPEN

    def _free_runner(self) -> Runner | None:
        free = [runner for runner in self._runners.values() if not runner.busy]
        if free:
            return max(free, key=lambda runner: runner.played)  # its caches are the warmest
        return self._start_runner() if len(self._runners) < self._most_runners else None

    def _start_runner(self) -> Runner | None:
        try:
            pid, connection = runners.start(self._play)
        except OSError as error:
            log.warning("the engine cannot start a process: %s", error)
            return None
        runner = Runner(
            pid=pid,
            channel=SelectorChannel(
                selector=self._selector, reading=connection, writing=connection, take=self._take, ended=self._end_broken
            ),
        )
        self._runners[pid] = runner
        return runner

    def _assign(self, runner: Runner, batch: list[Run]) -> None:
        by_host: dict[HostMessage, list[Run]] = {}
        for run in batch:
            by_host.setdefault(run.job.host, []).append(run)
        runner.busy, runner.is_one_job = True, len(batch) == 1
        if len(by_host) > 1:
            patience_s = self._patience_s * (1 + max(map(len, by_host.values())) / 4)
            runner.given_up_at = time.monotonic() + patience_s
        else:
            claims = (self._as_waiting(run).claim for run in batch)
            runner.claim = next((claim for claim in claims if self._shares.take(claim)), None)
        runner.runs = {run.number: run for run in batch}
        runner.played += 1
        connections = {run.job.host: run.connection.number for run in batch if run.connection}
        hosts = []
        for host, runs in by_host.items():
            orders = [BatchOrder(number=r.number, order=r.job.order, refused_after=r.refused_after) for r in runs]
            hosts.append(HostOrders(host=host, orders=tuple(orders), connection=connections[host]))
        runner.channel.send(BatchMessage(action=batch[0].job.action, hosts=tuple(hosts)))

    def _take(self, channel: SelectorChannel, line: bytes) -> None:
        runner = self._runner_of(channel)
        result = decode_as(Result, line)
        if result.finished:
            self._take_end(runner)
            return
        run = runner.runs.pop(result.number, None)
        if run is None:
            return  # the job was answered already
        if result.unreachable:
            self._suspect(run.job.host)
            run.connection = None
            self._try_again(run, result.message, may_retry=True)
        else:
            self._suspects.pop(run.job.host, None)
            self._finish(run, result)

    def _end_broken(self, channel: SelectorChannel, error: Exception | None) -> None:
        """Kill a runner that sent an invalid result. Any other one whose channel ended has died and will be reaped."""
        if isinstance(error, ChannelError):
            runners.kill(self._runner_of(channel).pid)

    def _runner_of(self, channel: SelectorChannel) -> Runner:
        return next(runner for runner in self._runners.values() if runner.channel is channel)

    def _take_end(self, runner: Runner) -> None:
        for run in runner.runs.values():
            self._finish(run, Result(ok=False, message=NO_RESULT))
        runner.busy, runner.given_up_at, runner.runs = False, inf, {}
        self._give_back(runner)
        if runner.played >= BATCHES_PER_RUNNER:
            self._kill(runner)

    def _give_back(self, runner: Runner) -> None:
        if runner.claim:
            self._shares.give_back(runner.claim)
            runner.claim = None

    def _try_again(self, run: Run, message: str, may_retry: bool) -> None:
        """Queue a job once more, alone, if another job may have caused the failure (`may_retry`); else answer it."""
        if may_retry and not run.alone:
            run.alone = True
            self._waiting.append(run)
        else:
            self._finish(run, Result(ok=False, message=message))

    def _end_late_ones(self, now: float) -> None:
        for run in [run for run in self._waiting if run.deadline <= now]:
            if run.connection is not None and run.connection.state is not State.OPEN:
                self._suspect(run.job.host)
                self._finish(run, Result(ok=False, message=_timed_out(run)))
            else:
                self._finish(run, Result(ok=False, message=f"{_timed_out(run)}, waiting for its turn"))
        for runner in list(self._runners.values()):
            late = [run for run in runner.runs.values() if run.deadline <= now]
            for run in late:
                del runner.runs[run.number]
                self._give_up(run.job.host, _timed_out(run))
                self._finish(run, Result(ok=False, message=_timed_out(run)))
            if late:
                self._kill(runner)

    def _end_stragglers(self, now: float) -> None:
        """Kill runs over several workers that take too long. Their unanswered jobs are tried again alone."""
        for runner in self._runners.values():
            if runner.given_up_at <= now and not runner.killed:
                for run in runner.runs.values():
                    self._give_up(run.job.host, "it did not answer in time")
                    run.connection = None
                self._kill(runner)

    def _kill(self, runner: Runner) -> None:
        """Kill a runner. `reaped` then handles its unanswered jobs."""
        runner.busy = runner.killed = True
        runners.kill(runner.pid)

    def _give_up(self, host: HostMessage, reason: str) -> None:
        self._suspect(host)
        self._connections.drop(host, reason)

    def _suspect(self, host: HostMessage) -> None:
        self._suspects[host] = time.monotonic() + SUSPECT_S

    def _finish(self, run: Run, result: Result) -> None:
        if run in self._waiting:
            self._waiting.remove(run)
        job, seconds = run.job, time.monotonic() - run.received
        state, reason = "done" if result.ok else "failed", f" ({result.message})" if result.message else ""
        what = f"{job.action} of {job.order.rental_id} on {job.host.worker_id}"
        log.info("%s: %s in %.3f s%s", what, state, seconds, reason)
        run.answer(OutcomeMessage(id=job.id, ok=result.ok, message=result.message, report=result.report))


def _timed_out(run: Run) -> str:
    return f"timed out after {run.job.deadline_s:g} s"
