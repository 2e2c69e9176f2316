"""The rental records of a worker: the highest epoch that it has seen of each rental, and a tombstone after a purge.

Both outlive a restart of the container. A command that outlived its controller carries an old epoch and is refused by
these records, so it cannot harm a later placement.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orion_worker.system.files import write_atomically
from orion_worker.system.locks import Lock, got_lock, opened_lock

Report = dict[str, Any]
"""The report of a command of orion-rental, as JSON carries it."""


class RequestRefused(Exception):
    """The worker refuses a request. `code` is stable; `details` are for programs."""

    def __init__(self, code: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.details = dict(details or {})


@dataclass(frozen=True, kw_only=True)
class RentalRecord:
    """A rental that has something on this worker."""

    rental_id: str
    username: str
    uid: int
    epoch: int
    ending: bool = False
    """Whether the purge of the rental has begun and is not yet proved complete."""
    activated: bool = False
    """Whether the renter could log in at this epoch: then its home is newer than any snapshot."""
    restored: str = ""
    """The snapshot from which the home was filled at this epoch, or from which filling it has begun."""
    rental_name: str = ""
    """The name that the owner gave the rental; empty where the order that made it had none."""
    retired: bool = False
    """Whether the files of the rental await their recovery, or were recovered: it never runs again at this epoch.

    A manager that went back to a backup in which the rental runs here makes it again. Only that, or a purge, ends
    the mark."""


RELEASED_NAMES = {"activated": "let_in", "retired": "laid_down"}
"""The names of fields in the files on disk where they differ from ours: workers of released versions wrote them."""


def check_create(record: RentalRecord | None, purged_epoch: int, epoch: int) -> None:
    """Raise RequestRefused unless an environment of this epoch may be made here. `purged_epoch`: 0 if never purged."""
    if epoch <= purged_epoch:
        raise RequestRefused("purged", f"epoch {epoch} was purged here (tombstone of epoch {purged_epoch})")
    if record and record.ending:
        raise RequestRefused("purge_unfinished", f"the purge of epoch {record.epoch} is not finished here")
    check_not_newer(record, epoch)


def check_unlock(record: RentalRecord | None, purged_epoch: int, epoch: int) -> RentalRecord:
    """Return the record of the environment here; raise RequestRefused unless it has exactly this epoch."""
    if epoch <= purged_epoch or (record and record.ending):
        raise RequestRefused("purged", f"epoch {epoch} was purged here")
    if record is None:
        raise RequestRefused("unknown_rental", "no such rental on this worker")
    if epoch != record.epoch:
        raise RequestRefused("stale_epoch", f"epoch {epoch} is not epoch {record.epoch}, which is here")
    return record


def check_receive(record: RentalRecord | None, purged_epoch: int, epoch: int) -> None:
    """Raise RequestRefused unless the home here is of exactly this epoch and was never activated at it."""
    check_unlock(record, purged_epoch, epoch)
    if record and record.activated:
        reason = "it was activated here at this epoch: its files are not overwritten"
        raise RequestRefused("let_in", reason, {"restored": record.restored})


def check_not_newer(record: RentalRecord | None, epoch: int) -> None:
    """Raise RequestRefused if the rental here is of a newer epoch than the order."""
    if record and epoch < record.epoch:
        raise RequestRefused("stale_epoch", f"epoch {epoch} is older than epoch {record.epoch}, which was seen here")


def check_not_retired(record: RentalRecord | None) -> None:
    """Raise RequestRefused if the rental is retired: its files may only be recovered and purged."""
    if record and record.retired:
        reason = "its files await their recovery: it is not frozen, copied or activated any more"
        raise RequestRefused("laid_down", reason)


def check_boot(boot_id: str, here: str) -> None:
    """Raise RequestRefused if an order is for another start of this container. An empty id means any start."""
    if boot_id and here and boot_id != here:
        raise RequestRefused("other_boot", "it is for another life of this worker's container")


@contextmanager
def locked_or_refused(file: Path, wait_s: float, reason: str, lock: Lock = fcntl.flock) -> Iterator[int]:
    """Hold the lock of a file, and give its descriptor. Raise RequestRefused (`busy`) if it is not free in time."""
    with opened_lock(file) as descriptor:
        if not got_lock(descriptor, wait_s, lock):
            raise RequestRefused("busy", f"{reason}; try again")
        yield descriptor


class RentalRecords:
    """The records as files, one for each rental, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tombstones = folder / "tombstones"
        self._locks = folder / "locks"
        for place in (self._folder, self._tombstones, self._locks):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)

    def locked(self, rental_id: str, wait_s: float) -> AbstractContextManager[int]:
        """Hold the lock of one rental; raise RequestRefused if it is not free within `wait_s`.

        Each rental has its own lock, so a long purge of one delays no other. A program that inherits the descriptor of
        the lock, which this gives, holds the lock for as long as it runs.
        """
        return locked_or_refused(self._locks / rental_id, wait_s, "another command for this rental is still at work")

    def find(self, rental_id: str) -> RentalRecord | None:
        """Return the record of a rental; None where it has none, or was purged at the epoch of its record."""
        try:
            record = _from_json((self._folder / f"{rental_id}.json").read_text())
        except FileNotFoundError:
            return None
        return record if record.epoch > self.purged_epoch(rental_id) else None

    def purged_epoch(self, rental_id: str) -> int:
        """Return the highest epoch of this rental that was purged here; 0 if none was."""
        try:
            return int((self._tombstones / rental_id).read_text())
        except FileNotFoundError:
            return 0

    def all(self) -> list[RentalRecord]:
        """Return the records of all rentals that have something here."""
        records = (self.find(file.stem) for file in sorted(self._folder.glob("*.json")))
        return [record for record in records if record]

    def save(self, record: RentalRecord) -> None:
        """Write the record of a rental over the one before."""
        write_atomically(self._folder / f"{record.rental_id}.json", _to_json(record))

    def bury(self, record: RentalRecord) -> None:
        """Write the tombstone of a purged rental, then remove its record.

        In this order a crash between the two leaves a record that `find` does not return any more.
        """
        epoch = max(record.epoch, self.purged_epoch(record.rental_id))
        write_atomically(self._tombstones / record.rental_id, str(epoch))
        (self._folder / f"{record.rental_id}.json").unlink(missing_ok=True)


def _to_json(record: RentalRecord) -> str:
    return json.dumps({RELEASED_NAMES.get(name, name): value for name, value in asdict(record).items()})


def _from_json(text: str) -> RentalRecord:
    ours = {released: name for name, released in RELEASED_NAMES.items()}
    return RentalRecord(**{ours.get(name, name): value for name, value in json.loads(text).items()})
