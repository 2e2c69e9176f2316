"""The manager's request for a transfer of a home: one line of JSON before the bytes of rsync."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from orion_worker.records import RequestRefused

SNAPSHOT_MARK = re.compile(r"[0-9a-f]{0,32}")
MAX_REQUEST_BYTES = 1 << 16
PAUSE_MOST_S = 10.0


@dataclass(frozen=True)
class TransferRequest:
    """One transfer of the files of a rental, to or from this worker."""

    rental_id: str
    epoch: int
    deadline: float
    """The Unix time at which the transfer is ended."""
    max_files: int = 0
    max_bytes: int = 0
    snapshot_id: str = ""
    """The snapshot that the home is filled from, which the rental's record keeps."""
    base: str = ""
    """The mark of the snapshot that the other side has; only changes since then are sent. Empty: it has none."""
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


def parse_request(line: bytes, now: float) -> TransferRequest:
    """Return the request in a line of JSON; `now` is the Unix time.

    Raise ValueError or TypeError if it is no request, RequestRefused if its deadline has passed.
    """
    payload = json.loads(line)
    ours = {RELEASED_NAMES.get(name, name): name for name in TransferRequest.__dataclass_fields__}
    if not isinstance(payload, dict) or payload.keys() - ours.keys():
        raise ValueError("it is no object, or has fields that are not known")
    request = TransferRequest(**{ours[released]: value for released, value in payload.items()})
    if not isinstance(request.rental_id, str) or not re.fullmatch(r"[a-z0-9-]{1,64}", request.rental_id):
        raise ValueError("rental_id is not an id")
    if type(request.epoch) is not int or request.epoch < 1:
        raise ValueError("epoch must be a whole number from 1")
    if not re.fullmatch(r"[0-9-]{0,64}", request.snapshot_id):
        raise ValueError("generation is not the id of a snapshot")
    if not (SNAPSHOT_MARK.fullmatch(request.base) and SNAPSHOT_MARK.fullmatch(request.mark)):
        raise ValueError("base and mark must be marks")
    for path, mode in request.folders.items():
        if not (re.fullmatch(r"2e(2f([0-9a-f]{2})+)?", path) and 0 <= mode < 0o10000):
            raise ValueError("folders must be modes by path")
    if not request.pause_s > 0:
        raise ValueError("pause_s must be a number over 0")
    if request.deadline <= now + 1:
        raise RequestRefused("deadline_passed", "its deadline has passed: the manager no longer waits for it")
    return request
