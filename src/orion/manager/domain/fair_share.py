"""Says who may have one more place of a queue, so that neither one owner nor what fails holds up the others.

An owner never has more than half of the places. What held its place in vain last time may hold it until its deadline
again: of an owner's all that did so has one place, and of all owners' half of the places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Claim:
    """The owner of a place, and whether the same held its place in vain last time."""

    owner: str
    fails: bool = False


def may_take(claim: Claim, taken: Mapping[Claim, int], places: int) -> bool:
    """Return whether this claim may have one more of so many places, of which these are taken."""
    if sum(taken.values()) >= places:
        return False
    half = max(1, places // 2)
    failing = sum(number for other, number in taken.items() if other.fails)
    if claim.fails and (taken.get(claim, 0) or failing >= half):
        return False
    return taken.get(claim, 0) + taken.get(replace(claim, fails=not claim.fails), 0) < half
