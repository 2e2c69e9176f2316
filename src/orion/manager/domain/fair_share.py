"""Shares of a limited number of places, so that neither one owner nor repeated failures hold up the others.

An owner has half of the places at most. Work that failed last time may take its place until its deadline again, so such
work has one place for each owner, and half of the places for all owners.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Claim:
    """A claim to a place: its owner, and whether the same work failed last time."""

    owner: str
    fails: bool = False


def may_take(claim: Claim, taken: Mapping[Claim, int], places: int) -> bool:
    """Return whether a claim may have one more of `places`; `taken`: the number of those in use by each claim."""
    if sum(taken.values()) >= places:
        return False
    half = max(1, places // 2)
    failing = sum(number for other, number in taken.items() if other.fails)
    if claim.fails and (taken.get(claim, 0) or failing >= half):
        return False
    return taken.get(claim, 0) + taken.get(replace(claim, fails=not claim.fails), 0) < half
