"""Files that must survive: a tree of difficult files, and a bank that is being written (tests/support)."""

from __future__ import annotations

import difflib
import json
import shlex
from pathlib import Path
from types import ModuleType

from renter import Renter
from support import bank, difficult_tree
from waiting import eventually

from orion.wire import Rental

OPEN_WITHIN_S = 60.0


def furnish(renter: Renter, rental: Rental) -> list[str]:
    """Create the tree, start the bank, and return the listing of the tree."""
    renter.inside(rental, _program(difficult_tree, "make", "tree"))
    renter.inside(rental, f"nohup {_program(bank, 'run', 'bank')} >/dev/null 2>&1 </dev/null & echo")
    eventually("the bank works", lambda: renter.ssh(rental, "cat bank/zz_B").stdout > "000000000003", OPEN_WITHIN_S)
    return _listing(renter, rental)


def check_all_is_there(renter: Renter, rental: Rental, listing: list[str]) -> None:
    """Assert that the tree is unchanged and that the bank is consistent."""
    lines = list(difflib.unified_diff(listing, _listing(renter, rental), "before", "after", n=0, lineterm=""))
    assert not lines, "\n".join(lines)
    assert json.loads(renter.ssh(rental, _program(bank, "check", "bank")).stdout) == []


def _listing(renter: Renter, rental: Rental) -> list[str]:
    return renter.inside(rental, _program(difficult_tree, "describe", "tree")).splitlines()


def _program(module: ModuleType, *arguments: str) -> str:
    return shlex.join(["python3", "-c", Path(str(module.__file__)).read_text(), *arguments])
