"""Comparing rosters: one that followed every commit with one that was just filled."""

from __future__ import annotations

from typing import Any

from orion.manager.domain.roster import Roster


def what_differs(one: Roster, other: Roster) -> dict[str, tuple[Any, Any]]:
    """Everything that they say differently; when states were entered is not compared."""
    told, tells = _all_of(one), _all_of(other)
    return {name: (told[name], tells[name]) for name in told if told[name] != tells[name]}


def _all_of(roster: Roster) -> dict[str, Any]:
    known = dict(roster.items())
    ids = sorted({*known, *roster._held})
    number = len(ids) + 1
    return {
        "workers": known,
        "held": {w: sorted(roster.held(w), key=lambda held: held.id) for w in ids},
        "restless": set(roster.restless(number)),
        "room": roster.room.best(number),
        "refusals": roster.refusals((), ()),
        "refuges": roster.refuges(()),
        "slots": roster.slots(),
        "by health": roster.by_health(),
        "by state": roster.by_state(),
        "waiting": roster.waiting(),
        "unsettled": set(roster._unsettled),
    }
