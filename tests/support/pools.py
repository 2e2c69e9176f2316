"""Compares pool indexes: one that followed every commit with one that was just filled."""

from __future__ import annotations

from typing import Any

from orion.manager.domain.pool_index import PoolIndex


def differences(one: PoolIndex, other: PoolIndex) -> dict[str, tuple[Any, Any]]:
    """Return the parts in which they differ; the times at which states were entered are not compared."""
    these, those = _all_of(one), _all_of(other)
    return {name: (these[name], those[name]) for name in these if these[name] != those[name]}


def _all_of(pool_index: PoolIndex) -> dict[str, Any]:
    known = dict(pool_index.items())
    ids = sorted({*known, *pool_index._placed})
    number = len(ids) + 1
    return {
        "workers": known,
        "held": {w: sorted(pool_index.placements_on(w), key=lambda held: held.id) for w in ids},
        "dirty": set(pool_index.dirty_workers(number)),
        "room": pool_index.room.best(number),
        "refusals": pool_index.refusals((), ()),
        "destinations": pool_index.destinations(()),
        "slots": pool_index.slots(),
        "by health": pool_index.by_health(),
        "by state": pool_index.by_state(),
        "waiting": pool_index.waiting(),
        "unsettled": set(pool_index._unsettled),
    }
