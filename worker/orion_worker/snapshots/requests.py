"""Requests"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from orion_worker.records import Refused

SNAPSHOT_MARK = re.compile(r"[0-9a-f]{0,32}")
LONGEST_REQUEST = 1 << 16
PAUSE_MOST_S = 10.0


@dataclass(frozen=True)
class Wish:
    rental_id: str
    epoch: int
    deadline: float
    """Unix time at which the transfer is ended."""
    max_files: int = 0
    max_bytes: int = 0
    generation: str = ""
    """The copy that is received, kept in the record."""
    base: str = ""
    """The mark of the snapshot that the other side has: only what changed since is sent. Empty: it has none."""
    mark: str = ""
    """The mark of the snapshot that is sent or received."""
    folders: Mapping[str, int] = field(default_factory=dict)
    """Modes that directories of a home that is filled have to get, by path in hexadecimal: see odd_folders."""
    moving: bool = False
    """Whether it is for a planned move: somebody waits, and nothing may be left behind."""
    pause_s: float = PAUSE_MOST_S
    """The seconds for which the programs of the rental may be stopped for it, unless it is for a planned move."""


def parse_request(line: bytes, now: float) -> Wish:
    """Raises ValueError or TypeError for what is no request, Refused for one that is late."""
    wish = Wish(**json.loads(line))
    if not isinstance(wish.rental_id, str) or not re.fullmatch(r"[a-z0-9-]{1,64}", wish.rental_id):
        raise ValueError("rental_id is not an id")
    if type(wish.epoch) is not int or wish.epoch < 1:
        raise ValueError("epoch must be a whole number from 1")
    if not re.fullmatch(r"[0-9-]{0,64}", wish.generation):
        raise ValueError("generation is not one")
    if not (SNAPSHOT_MARK.fullmatch(wish.base) and SNAPSHOT_MARK.fullmatch(wish.mark)):
        raise ValueError("base and mark must be marks")
    for path, mode in wish.folders.items():
        if not (re.fullmatch(r"2e(2f([0-9a-f]{2})+)?", path) and 0 <= mode < 0o10000):
            raise ValueError("folders must be modes by path")
    if not wish.pause_s > 0:
        raise ValueError("pause_s must be a number over 0")
    if wish.deadline <= now + 1:
        raise Refused("deadline_passed", "its deadline has passed: who ordered it no longer waits for it")
    return wish
