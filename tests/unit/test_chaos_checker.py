"""The checker of the chaos tests notices each broken promise, and reports nothing where none is broken."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
from chaos.checker import WAKE_BUDGET_S, check, longest_waking_s, lost_lines
from chaos.history import End, Found, GrantedRental, Happened, History, InjectedFault, Shown, Tick, WorkerEnd, story
from chaos.nemesis import KINDS, plan
from chaos.witness import line_of, number_of

LAB, GUEST = "lab2345678", "gst2345678"
FIRST, SECOND = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
KILLED_AT, ACTIVE_AT, SAFE_AT = 10.0, 12.0, 8.0
"""The rental runs on FIRST until that is killed, and on SECOND from ACTIVE_AT on, with a snapshot of SAFE_AT."""


def _ticks(rental: str, host: str, epoch: int, pid: int, first: int, seconds: Iterable[float]) -> tuple[Tick, ...]:
    return tuple(Tick(at, rental, host, epoch, pid, number) for number, at in enumerate(seconds, start=first))


def _lines(ticks: Iterable[Tick]) -> tuple[str, ...]:
    return tuple(line_of(one.number, one.at, one.rental, one.host, one.epoch).rstrip() for one in ticks)


def _event(at: float, kind: str, rental: str | None, worker: str, epoch: int | None = None) -> Happened:
    return Happened(at, kind, rental, worker, epoch, "as planned")


BEFORE = _ticks(LAB, FIRST, 1, 50, 1, (1.0, 3.0, 5.0, 7.0, 9.0))
AFTER = _ticks(LAB, SECOND, 2, 70, 5, (12.5, 14.0, 16.0))
GOOD = History(
    asked=(GrantedRental(LAB, "lab", released=False), GrantedRental(GUEST, "guest", released=True)),
    ticks=(*BEFORE, *AFTER),
    deeds=(InjectedFault("kill", FIRST, KILLED_AT, KILLED_AT + 0.1, 13.0, 13.3),),
    shown=(Shown(8.5, LAB, 1, SAFE_AT), Shown(15.0, LAB, 2, SAFE_AT), Shown(20.0, LAB, 2, 19.0)),
    events=(
        _event(0.5, "rental.activated", LAB, "w-first", 1),
        _event(11.5, "worker.became_down", None, "w-first"),
        _event(ACTIVE_AT, "rental.activated", LAB, "w-second", 2),
    ),
    ends={
        LAB: End("active", 2, "w-second", "r-lab", "", _lines((*BEFORE[:4], *AFTER))),
        GUEST: End("released", 1, None, "r-gst", ""),
    },
    workers={
        "w-first": WorkerEnd(FIRST, "ready", "active", "", ()),
        "w-second": WorkerEnd(SECOND, "ready", "active", "", ("account r-lab", "home r-lab", "key r-lab")),
    },
)


def _broken(history: History) -> list[str]:
    return [str(violation) for violation in check(history)]


def _with_end(**change: object) -> History:
    return replace(GOOD, ends=GOOD.ends | {LAB: replace(GOOD.ends[LAB], **change)})  # type: ignore[arg-type]


def _with_worker(identity: str, **change: object) -> History:
    return replace(GOOD, workers=GOOD.workers | {identity: replace(GOOD.workers[identity], **change)})  # type: ignore[arg-type]


def test_a_takeover_that_loses_only_lines_younger_than_the_snapshot_breaks_no_promise() -> None:
    assert _broken(GOOD) == []
    assert lost_lines(GOOD) == 1
    assert longest_waking_s(GOOD) == 0


def test_a_forgotten_rental_is_reported() -> None:
    (text,) = _broken(replace(GOOD, ends={GUEST: GOOD.ends[GUEST]}, workers={}))
    assert "nothing lost: lab" in text


@pytest.mark.parametrize("state", ["queued", "migrating", "failed", "released"])
def test_a_rental_that_does_not_become_active_again_is_reported(state: str) -> None:
    assert "nothing lost: lab" in _broken(_with_end(state=state))[0]


def test_a_release_without_end_is_reported() -> None:
    ends = GOOD.ends | {GUEST: replace(GOOD.ends[GUEST], state="releasing")}
    (text,) = _broken(replace(GOOD, ends=ends))
    assert "no stuck state: guest" in text


def test_a_process_that_outlives_the_next_epoch_is_reported_with_its_history() -> None:
    late = Tick(ACTIVE_AT + 0.2, LAB, FIRST, 1, 50, 6)
    history = replace(GOOD, ticks=(*GOOD.ticks, late))
    (found,) = check(history)
    assert "never two live copies: epoch 1" in str(found)
    lines = story(history, found.rental, found.since, found.until)
    assert lines.index("NEMESIS kill") < lines.index("worker.became_down") < lines.index(f"lives on {SECOND}")


def test_an_epoch_begins_with_its_activation_even_before_its_first_tick() -> None:
    late = Tick(ACTIVE_AT + 0.2, LAB, FIRST, 1, 50, 6)
    assert late.at < AFTER[0].at
    assert len(_broken(replace(GOOD, ticks=(*BEFORE, late, *AFTER)))) == 1


def test_one_epoch_on_two_workers_is_reported() -> None:
    texts = _broken(
        replace(GOOD, ticks=(*GOOD.ticks, Tick(17.0, LAB, FIRST, 2, 90, 8), Tick(18, LAB, SECOND, 2, 70, 8)))
    )
    assert texts[0] == f"never two live copies: epoch 2 of {LAB} lives on {SECOND} and on {FIRST}"


def test_a_line_lost_by_a_planned_migration_is_reported_however_young_it_was() -> None:
    moved = Happened(11.8, "rental.moved", LAB, "w-second", 2, "migrated with all its files")
    (text,) = _broken(replace(GOOD, events=tuple(sorted((*GOOD.events, moved), key=lambda one: one.at))))
    assert text.startswith("nothing lost: 1 lines of lab")
    assert f"line 5, written on {FIRST} at 9.000 in epoch 1" in text


def test_a_line_lost_by_a_park_is_reported() -> None:
    parked = Happened(10.5, "rental.parked", LAB, "w-first", 1, "moved away, to wait")
    assert len(_broken(replace(GOOD, events=tuple(sorted((*GOOD.events, parked), key=lambda one: one.at))))) == 1


def _paused(until: float, stale: Iterable[float]) -> History:
    deed = InjectedFault("pause", FIRST, KILLED_AT, KILLED_AT + 0.1, until, until + 0.4)
    return replace(GOOD, deeds=(deed,), ticks=(*GOOD.ticks, *_ticks(LAB, FIRST, 1, 50, 6, stale)))


def test_a_process_that_wakes_late_may_run_for_the_wake_budget_from_its_first_tick() -> None:
    history = _paused(20.0, (20.3, 20.5, 20.3 + WAKE_BUDGET_S))
    assert _broken(history) == []
    assert longest_waking_s(history) == pytest.approx(WAKE_BUDGET_S)


def test_a_process_that_wakes_and_runs_longer_is_reported() -> None:
    assert "never two live copies" in _broken(_paused(20.0, (20.3, 20.3 + WAKE_BUDGET_S + 0.05)))[0]


def test_a_pause_excuses_only_its_own_worker_and_only_after_its_end() -> None:
    assert len(_broken(_paused(20.0, (19.9,)))) == 1
    deed = InjectedFault("pause", SECOND, KILLED_AT, 10.1, 12.0, 12.1)
    history = replace(GOOD, deeds=(*GOOD.deeds, deed), ticks=(*GOOD.ticks, Tick(12.2, LAB, FIRST, 1, 50, 6)))
    assert len(_broken(history)) == 1


def test_a_lost_line_that_is_older_than_the_shown_snapshot_is_reported() -> None:
    renumbered = tuple(replace(one, number=one.number - 1) for one in AFTER)
    history = replace(_with_end(lines=_lines((*BEFORE[:3], *renumbered))), ticks=(*BEFORE, *renumbered))
    (text,) = _broken(history)
    assert f"1 lines of lab ({LAB}) are lost" in text
    assert "line 4" in text


def test_a_state_that_never_existed_is_reported_after_a_restore_and_at_the_end() -> None:
    line = json.dumps({"words": f"{LAB} {SECOND} 2", "at": 12.2, "faults": ["19999988 of 20000000 units"]})
    (found,) = check(replace(GOOD, found=(Found.parse(line), Found(14.0, LAB, SECOND, 2, ()))))
    assert str(found) == (
        f"a state that existed: the files of {LAB} on {SECOND} in epoch 2 never existed like this: "
        "19999988 of 20000000 units"
    )
    lines = story(replace(GOOD, found=(Found.parse(line),)), LAB, found.since, found.until)
    assert f"its bank on {SECOND}, epoch 2: 19999988 of" in lines
    (text,) = _broken(_with_end(faults=("< './tree/x' file 0000",)))
    assert text.startswith("a state that existed: the final files of ")
    assert text.endswith("never existed like this: < './tree/x' file 0000")


def test_the_snapshot_time_of_a_later_epoch_does_not_judge_lines_of_an_earlier_one() -> None:
    assert _broken(replace(GOOD, shown=(*GOOD.shown, Shown(30.0, LAB, 2, 29.0)))) == []


@pytest.mark.parametrize(
    "lines",
    [
        _lines((*BEFORE[:3], *AFTER)),
        (*_lines((*BEFORE[:4], *AFTER[:2])), "7 16.0 lab2345678 bbbbbbbbbbbb 2 00000000"),
        _lines((*BEFORE[:4], *(replace(one, rental=GUEST) for one in AFTER))),
        _lines((*BEFORE[:4], BEFORE[3], *AFTER)),
    ],
    ids=["a gap", "a wrong checksum", "somebody else's", "twice"],
)
def test_altered_lines_are_reported(lines: tuple[str, ...]) -> None:
    assert "nothing lost: line " in _broken(_with_end(lines=lines))[0]


def test_an_active_rental_without_processes_is_reported() -> None:
    history = replace(_with_end(lines=_lines(BEFORE[:4])), ticks=BEFORE)
    assert any("but lived last as epoch 1" in text for text in _broken(history))


def test_a_process_that_ends_on_an_undisturbed_worker_is_reported() -> None:
    another = _ticks(LAB, SECOND, 2, 99, 8, (18.0,))
    history = replace(_with_end(lines=_lines((*BEFORE[:4], *AFTER, *another))), ticks=(*GOOD.ticks, *another))
    (text,) = _broken(history)
    assert "process 70" in text
    restarted = replace(history, deeds=(*GOOD.deeds, InjectedFault("restart", SECOND, 16.5, 17.0, 17.0, 17.0)))
    assert _broken(restarted) == []


@pytest.mark.parametrize(
    "trace", ["account r-gst", "key r-gst", "home r-gst", "process 7 (sh) of r-gst", "file /x of 100003"]
)
def test_any_residue_of_a_renter_is_reported(trace: str) -> None:
    (text,) = _broken(_with_worker("w-first", traces=(trace,)))
    assert text.startswith("clean leaving")
    assert trace in text


def test_residue_on_a_former_worker_is_reported() -> None:
    assert len(_broken(_with_worker("w-first", traces=("locked key r-lab",)))) == 1


def test_an_active_rental_without_its_key_is_reported() -> None:
    assert "no account or key" in _broken(_with_worker("w-second", traces=("account r-lab", "locked key r-lab")))[0]


@pytest.mark.parametrize("change", [{"health": "quarantined"}, {"health": "suspect"}, {"intent": "draining"}])
def test_a_dirty_worker_at_the_end_is_reported(change: dict[str, str]) -> None:
    assert "no stuck state" in _broken(_with_worker("w-first", **change))[0]


def test_the_report_names_why_the_platform_did_not_settle() -> None:
    assert _broken(replace(GOOD, dirty_workers=("the brake is on",))) == ["no stuck state: the brake is on"]


def test_a_worker_that_is_down_though_only_the_proxy_was_away_is_reported() -> None:
    history = replace(GOOD, deeds=(InjectedFault("kill", "manager_proxy", 2.0, 2.1, 11.0, 11.2),))
    (text,) = _broken(history)
    assert text.startswith(f"no stampede: {FIRST} became down at 11.500")


def test_a_line_is_known_by_its_checksum_and_its_rental() -> None:
    line = line_of(7, 1.5, LAB, FIRST, 3)
    assert number_of(line, LAB) == 7
    assert number_of(line, GUEST) is None
    assert number_of(line[:-4], LAB) is None
    assert number_of(line.replace("7", "8", 1), LAB) is None
    assert number_of("", LAB) is None


def test_a_plan_is_the_same_for_the_same_seed_and_ends_in_time() -> None:
    acts = plan(7, 80)
    assert acts == plan(7, 80) != plan(8, 80)
    assert all(act.at_s + act.lasts_s <= 80.01 and act.service in KINDS[act.kind].services for act in acts)
    whole_deck = {act.kind for act in plan(7, 300)}
    assert whole_deck == set(KINDS)
