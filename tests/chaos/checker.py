"""Check a history against the guarantees. Each rule is a pure function that yields the violations of one guarantee.

Ticks show which processes were alive. One exception is allowed: a worker whose container was paused until its rental
was taken over may run it for `WAKE_BUDGET_S` after it was unpaused. That time counts from the first tick of any rental
on the worker, because docker reports the unpause only some time later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from chaos.history import End, GrantedRental, History, InjectedFault, Tick, WorkerEnd
from chaos.witness import number_of
from orion.manager.domain.clocks import Clocks

WAKE_BUDGET_S = Clocks.wake_budget_s
"""Seconds by the default clocks: stopping processes does not become faster with faster clocks."""
EXCUSED_S = 15.0
"""Seconds after the end of a fault in which it may still cause the loss of its worker: longer than a takeover."""
PAUSE = "pause"
ENDS_ALL = ("kill", "restart")
"""The faults that end all processes of a container."""
ENDED = ("released", "expired")
Ticks = list[Tick]


@dataclass(frozen=True)
class Violation:
    promise: str
    text: str
    rental: str | None = None
    since: float = 0.0
    until: float = float("inf")
    """The end of the time (from `since`) whose events explain the violation."""

    def __str__(self) -> str:
        return f"{self.promise}: {self.text}"


def check(history: History) -> list[Violation]:
    return [violation for rule in RULES for violation in rule(history)]


def _nothing_is_lost(history: History) -> Iterator[Violation]:
    for one in history.asked:
        end = history.ends.get(one.rental)
        found = f"{end.state}: {end.explanation}" if end else "not known any more"
        if one.released and (end is None or end.state not in ENDED):
            yield Violation("no stuck state", f"{one.name} ({one.rental}) was released, and is {found}", one.rental)
        if not one.released and (end is None or end.state != "active"):
            yield Violation("nothing lost", f"{one.name} ({one.rental}) was rented, and is {found}", one.rental)


def _never_alive_twice(history: History) -> Iterator[Violation]:
    """Check that no epoch runs after a later one was activated, and that no epoch runs on two workers."""
    for rental, ticks in _by_rental(history).items():
        hosts: dict[int, str] = {}
        for tick in ticks:
            if hosts.setdefault(tick.epoch, tick.host) != tick.host:
                text = f"epoch {tick.epoch} of {rental} lives on {hosts[tick.epoch]} and on {tick.host}"
                yield Violation("never two live copies", text, rental, tick.at - 30, tick.at + 5)
                break
        begins = _begins(history, rental, ticks)
        late = [tick for tick in ticks if _outlived_s(tick, begins) > 0 and not _is_waking(history, tick)]
        if late:
            worst = max(late, key=lambda tick: _outlived_s(tick, begins))
            text = (
                f"epoch {worst.epoch} of {rental} lives on {worst.host} at {worst.at:.3f}, "
                f"{_outlived_s(worst, begins):.3f} s after a later one began ({len(late)} ticks too late)"
            )
            yield Violation("never two live copies", text, rental, late[0].at - 30, worst.at + 5)


def _begins(history: History, rental: str, ticks: Ticks) -> dict[int, float]:
    """Return the begin of each epoch: its event of activation or its first tick, whichever came first."""
    begins: dict[int, float] = {}
    for event in history.events:
        if event.rental == rental and event.kind == "rental.activated" and event.epoch:
            begins[event.epoch] = min(begins.get(event.epoch, event.at), event.at)
    for tick in ticks:
        begins[tick.epoch] = min(begins.get(tick.epoch, tick.at), tick.at)
    return begins


def _outlived_s(tick: Tick, begins: dict[int, float]) -> float:
    later = [at for epoch, at in begins.items() if epoch > tick.epoch]
    return tick.at - min(later) if later else 0.0


def _is_waking(history: History, tick: Tick) -> bool:
    return any(0 <= tick.at - woke <= WAKE_BUDGET_S for woke in _wakings(history, tick.host))


def _wakings(history: History, host: str) -> Iterator[float]:
    for deed in history.deeds:
        if deed.kind == PAUSE and deed.host == host:
            signs = [one.at for one in history.ticks if one.host == host and one.at >= deed.undone_from]
            if signs:
                yield min(signs)


def longest_waking_s(history: History) -> float:
    """Return the longest time that a stale rental ran after its worker was unpaused: what the wake budget allows."""
    found = [0.0]
    for rental, ticks in _by_rental(history).items():
        begins = _begins(history, rental, ticks)
        stale = [tick for tick in ticks if _outlived_s(tick, begins) > 0]
        found += [tick.at - woke for tick in stale for woke in _wakings(history, tick.host) if tick.at >= woke]
    return max(found)


def _lines_are_whole(history: History) -> Iterator[Violation]:
    for one in _kept(history):
        for position, line in enumerate(history.ends[one.rental].lines, start=1):
            if number_of(line, one.rental) != position:
                text = f"line {position} of {one.name} ({one.rental}) is {line[:120]!r}"
                yield Violation("nothing lost", text, one.rental)
                break


def _no_line_is_lost_beyond_the_shown_age(history: History) -> Iterator[Violation]:
    """Check that no line is lost that was written, in the same epoch, before a snapshot that the API reported."""
    ticks_of = _by_rental(history)
    for one in _kept(history):
        there = {_written(line) for line in history.ends[one.rental].lines}
        safe = _safe_until(history, one.rental)
        lost = [
            tick
            for tick in ticks_of.get(one.rental, ())
            if tick.at <= safe.get(tick.epoch, 0.0) and (tick.number, tick.host, tick.epoch) not in there
        ]
        if lost:
            text = (
                f"{len(lost)} lines of {one.name} ({one.rental}) are lost that are older than the shown snapshot: "
                f"line {lost[0].number}, written on {lost[0].host} at {lost[0].at:.3f} in epoch {lost[0].epoch}; "
                f"the snapshot was reported as of {safe[lost[0].epoch]:.3f}"
            )
            yield Violation("nothing lost", text, one.rental, lost[0].at - 10)


def _a_planned_move_loses_nothing(history: History) -> Iterator[Violation]:
    """Check that no line is lost of an epoch that a planned migration or a park ended, even if the target fails."""
    ticks_of = _by_rental(history)
    for one in _kept(history):
        there = {_written(line) for line in history.ends[one.rental].lines}
        for epoch, at in _moved_by_plan(history, one.rental):
            of_epoch = (tick for tick in ticks_of.get(one.rental, ()) if tick.epoch == epoch)
            lost = [tick for tick in of_epoch if (tick.number, tick.host, tick.epoch) not in there]
            if lost:
                text = (
                    f"{len(lost)} lines of {one.name} ({one.rental}) are lost that were there at its planned "
                    f"migration at {at:.3f}: line {lost[0].number}, written on {lost[0].host} at {lost[0].at:.3f} in "
                    f"epoch {epoch}"
                )
                yield Violation("nothing lost", text, one.rental, lost[0].at - 10, at + 30)


def _moved_by_plan(history: History, rental: str) -> Iterator[tuple[int, float]]:
    """Yield the epochs that a planned migration or a park ended, each with its time."""
    let_in = [e.epoch for e in history.events if e.rental == rental and e.kind == "rental.activated" and e.epoch]
    for event in history.events:
        if event.rental != rental or not event.epoch:
            continue
        if event.kind == "rental.parked":
            yield event.epoch, event.at
        elif event.kind == "rental.moved":  # its epoch is that of the target placement
            yield from (
                (epoch, event.at) for epoch in [max((e for e in let_in if e < event.epoch), default=0)] if epoch
            )


def lost_lines(history: History) -> int:
    """Return the number of lost lines of rentals that are active in the end: the cost of takeovers."""
    ticks_of, lost = _by_rental(history), 0
    for one in _kept(history):
        there = {_written(line) for line in history.ends[one.rental].lines}
        lost += sum((tick.number, tick.host, tick.epoch) not in there for tick in ticks_of.get(one.rental, ()))
    return lost


def _safe_until(history: History, rental: str) -> dict[int, float]:
    safe: dict[int, float] = defaultdict(float)
    for shown in history.shown:
        if shown.rental == rental and shown.safe_at is not None:
            safe[shown.epoch] = max(safe[shown.epoch], shown.safe_at)
    return safe


def _written(line: str) -> tuple[int, str, int]:
    number, _at, _rental, host, epoch = (line.split() + ["0"] * 5)[:5]
    return (int(number) if number.isdecimal() else 0, host, int(epoch) if epoch.isdecimal() else 0)


def _what_is_given_back_existed(history: History) -> Iterator[Violation]:
    """Check that restored files are a state that existed: right sums, files in their order, and no missing entry."""
    for one in history.found:
        if one.faults:
            what = "; ".join(one.faults)
            text = f"the files of {one.rental} on {one.host} in epoch {one.epoch} never existed like this: {what}"
            yield Violation("a state that existed", text, one.rental, one.at - 30, one.at + 5)
    for asked in _kept(history):
        if faults := history.ends[asked.rental].faults:
            text = (
                f"the final files of {asked.name} ({asked.rental}) never existed like this: {'; '.join(faults)[:1500]}"
            )
            yield Violation("a state that existed", text, asked.rental)


def _every_kept_rental_goes_on(history: History) -> Iterator[Violation]:
    """Check that the process of each rental that must be active runs where the platform says."""
    for one in _kept(history):
        end = history.ends[one.rental]
        host = history.workers[end.worker].host if end.worker in history.workers else end.worker
        last = max(_by_rental(history).get(one.rental, ()), key=lambda tick: (tick.epoch, tick.at), default=None)
        if last is None or (last.epoch, last.host) != (end.epoch, host):
            where = f"epoch {last.epoch} on {last.host}" if last else "nowhere"
            text = f"{one.name} ({one.rental}) is active with epoch {end.epoch} on {host}, but lived last as {where}"
            yield Violation("nothing lost", text, one.rental)


def _nobody_dies_for_nothing(history: History) -> Iterator[Violation]:
    """Check that a renter's process ended only with its container or its placement."""
    for rental, ticks in _by_rental(history).items():
        last: dict[tuple[str, int], Tick] = {}
        for tick in ticks:
            before = last.get((tick.host, tick.epoch))
            if before and before.pid != tick.pid and not _was_ended(history, before, tick):
                text = (
                    f"process {before.pid} of {rental} on {tick.host} was alive at {before.at:.3f} and then no more, "
                    "though its container and its placement were not ended"
                )
                yield Violation("nothing lost", text, rental, before.at - 10, tick.at + 1)
            last[tick.host, tick.epoch] = tick


def _was_ended(history: History, before: Tick, after: Tick) -> bool:
    ends = [deed for deed in history.deeds if deed.kind in ENDS_ALL and deed.host == before.host]
    return any(deed.undone_at >= before.at and deed.began_at <= after.at for deed in ends)


def _nothing_is_left(history: History) -> Iterator[Violation]:
    for identity, worker in history.workers.items():
        here = [end for end in history.ends.values() if end.state == "active" and end.worker == identity]
        left = [trace for trace in worker.traces if not any(_belongs_to(trace, end) for end in here)]
        if left:
            text = f"on {worker.host} ({identity}) is left: {', '.join(left[:12])} ({len(left)} in all)"
            yield Violation("clean leaving", text)
        for end in here:
            if f"account {end.username}" not in worker.traces or f"key {end.username}" not in worker.traces:
                yield Violation("nothing lost", f"{end.username} has no account or key on {worker.host}")


def _belongs_to(trace: str, end: End) -> bool:
    return trace.rsplit(maxsplit=1)[-1] == end.username


def _all_is_at_rest(history: History) -> Iterator[Violation]:
    for identity, worker in history.workers.items():
        if (worker.health, worker.intent) != ("ready", "active"):
            text = f"{worker.host} ({identity}) is {worker.health}, {worker.intent}: {worker.explanation}"
            yield Violation("no stuck state", text)
    for text in history.dirty_workers:
        yield Violation("no stuck state", text)


def _nobody_is_down_for_nothing(history: History) -> Iterator[Violation]:
    """Check that a worker was declared down only after a fault on it, and not because proxy or manager were away."""
    for event in history.events:
        if event.kind != "worker.became_down" or event.worker not in history.workers:
            continue
        worker = history.workers[event.worker]
        if not any(_explains(deed, worker, event.at) for deed in history.deeds):
            text = f"{worker.host} became down at {event.at:.3f} ({event.reason}), and nothing had been done to it"
            yield Violation("no stampede", text, None, event.at - 30, event.at + 5)


def _explains(deed: InjectedFault, worker: WorkerEnd, at: float) -> bool:
    return deed.host == worker.host and deed.began_at <= at <= deed.undone_at + EXCUSED_S


def _kept(history: History) -> Iterator[GrantedRental]:
    """Yield the rentals that must be active in the end and are. Another rule checks the others."""
    for one in history.asked:
        end = history.ends.get(one.rental)
        if not one.released and end is not None and end.state == "active":
            yield one


def _by_rental(history: History) -> dict[str, Ticks]:
    found: dict[str, Ticks] = defaultdict(list)
    for tick in sorted(history.ticks, key=lambda one: one.at):
        found[tick.rental].append(tick)
    return found


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (
    _nothing_is_lost,
    _never_alive_twice,
    _lines_are_whole,
    _no_line_is_lost_beyond_the_shown_age,
    _a_planned_move_loses_nothing,
    _what_is_given_back_existed,
    _every_kept_rental_goes_on,
    _nobody_dies_for_nothing,
    _nothing_is_left,
    _all_is_at_rest,
    _nobody_is_down_for_nothing,
)
