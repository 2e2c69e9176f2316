"""The manager's request for a transfer of a home: one line of JSON before the bytes of rsync."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orion_worker.records import RequestRefused

_ID, _SNAPSHOT_ID = re.compile(r"[a-z0-9-]{1,64}"), re.compile(r"[0-9-]{0,64}")
_MARK, _FOLDER = re.compile(r"[0-9a-f]{0,32}"), re.compile(r"2e(2f([0-9a-f]{2})+)?")
MAX_REQUEST_BYTES = 1 << 16
PAUSE_MOST_S = 10.0


@dataclass(frozen=True, kw_only=True)
class TransferRequest:
    """One transfer of the files of a rental, to or from this worker."""

    rental_id: str
    epoch: int
    deadline: float
    """The Unix time at which the transfer is ended."""
    max_files: int = 0
    max_bytes: int = 0
    snapshot_id: str = ""
    """The id of the snapshot that the home is filled with, which the rental's record keeps."""
    base: str = ""
    """The mark of the snapshot that the other side has; only changes since then are sent. Empty if it has none."""
    mark: str = ""
    """The mark of the snapshot that is sent or received."""
    folders: Mapping[str, int] = field(default_factory=dict)
    """The modes that directories of a filled home get at the end, by path in hexadecimal (scan.closed_folders)."""
    for_migration: bool = False
    """Whether the transfer belongs to a planned migration: a renter waits, and no file may be left behind."""
    pause_s: float = PAUSE_MOST_S
    """The seconds for which the programs of the rental may be stopped, unless the transfer is for a migration."""


RELEASED_NAMES = {"snapshot_id": "generation", "for_migration": "moving"}
"""The names of fields in the line of JSON where they differ from ours: managers of released versions send them."""
_RULES: tuple[tuple[Callable[[TransferRequest], object], str], ...] = (
    (lambda it: isinstance(it.rental_id, str) and _ID.fullmatch(it.rental_id), "rental_id is not an id"),
    (lambda it: type(it.epoch) is int and it.epoch >= 1, "epoch must be a whole number from 1"),
    (lambda it: _SNAPSHOT_ID.fullmatch(it.snapshot_id), "generation is not the id of a snapshot"),
    (lambda it: _MARK.fullmatch(it.base) and _MARK.fullmatch(it.mark), "base and mark must be marks"),
    (lambda it: all(_FOLDER.fullmatch(path) for path in it.folders), "folders must be modes by path"),
    (lambda it: all(0 <= mode < 0o10000 for mode in it.folders.values()), "folders must be modes by path"),
    (lambda it: it.pause_s > 0, "pause_s must be a number over 0"),
)
"""The rules for a request, and the error of a request that breaks one."""


def parse_request(line: bytes, now: float) -> TransferRequest:
    """Return the request in a line of JSON; `now` is the Unix time.

    Raise ValueError or TypeError if it is no request, RequestRefused if its deadline has passed.
    """
    payload = json.loads(line)
    ours = {RELEASED_NAMES.get(name, name): name for name in TransferRequest.__dataclass_fields__}
    if not isinstance(payload, dict) or payload.keys() - ours.keys():
        raise ValueError("it is no object, or has fields that are not known")
    request = TransferRequest(**{ours[released]: value for released, value in payload.items()})
    for holds, problem in _RULES:
        if not holds(request):
            raise ValueError(problem)
    if request.deadline <= now + 1:
        raise RequestRefused("deadline_passed", "its deadline has passed: the manager no longer waits for it")
    return request
