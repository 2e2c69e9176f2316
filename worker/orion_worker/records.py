"""What a worker remembers of each rental: the highest epoch it has seen, and a tombstone after a purge.

Both outlive a restart of the container. A command that outlived its controller carries an old epoch, and is
refused here: so it can do no harm to what came after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orion_worker.system.locks import got_lock, opened_lock


class Refused(Exception):
    """The worker will not do it, and says why. `code` is stable; `details` are for programs."""

    def __init__(self, code: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.details = dict(details or {})


@dataclass(frozen=True)
class Record:
    """A rental that has something on this worker. `ending`: its purge has begun and is not yet proved complete."""

    rental_id: str
    username: str
    uid: int
    epoch: int
    ending: bool = False
    let_in: bool = False
    """Its renter was let in at this epoch: what its home holds is newer than any copy."""
    restored: str = ""
    """The copy with which its home was filled at this epoch, or was begun to be."""
    rental_name: str = ""
    """The name that its owner knows it by; empty where the order that made it had none."""
    laid_down: bool = False
    """Whether its files wait for a salvage, or have had one: nothing of it goes on at this epoch any more."""


def check_create(record: Record | None, purged_epoch: int, epoch: int) -> None:
    """Raise Refused unless an environment of this epoch may be made here. `purged_epoch`: 0 if never purged."""
    if epoch <= purged_epoch:
        raise Refused("purged", f"epoch {epoch} was purged here (tombstone of epoch {purged_epoch})")
    if record and record.ending:
        raise Refused("purge_unfinished", f"the purge of epoch {record.epoch} is not finished here")
    if record and epoch < record.epoch:
        raise Refused("stale_epoch", f"epoch {epoch} is older than epoch {record.epoch}, which was seen here")


def check_unlock(record: Record | None, purged_epoch: int, epoch: int) -> None:
    """Raise Refused unless the environment here has exactly this epoch."""
    if epoch <= purged_epoch or (record and record.ending):
        raise Refused("purged", f"epoch {epoch} was purged here")
    if record is None:
        raise Refused("unknown_rental", "no such rental on this worker")
    if epoch != record.epoch:
        raise Refused("stale_epoch", f"epoch {epoch} is not epoch {record.epoch}, which is here")


def check_receive(record: Record | None, purged_epoch: int, epoch: int) -> None:
    """Raise Refused unless the home here is of exactly this epoch and nobody was let into it yet."""
    check_unlock(record, purged_epoch, epoch)
    if record and record.let_in:
        told = {"restored": record.restored}
        raise Refused("let_in", "its renter was let in here at this epoch: nothing is put over its files", told)


def check_not_newer(record: Record | None, epoch: int) -> None:
    """Raise Refused if what is here is newer than the order to lock or purge it."""
    if record and epoch < record.epoch:
        raise Refused("stale_epoch", f"epoch {epoch} is older than epoch {record.epoch}, which was seen here")


def check_not_laid_down(record: Record | None) -> None:
    """Raise Refused if the files of the rental wait to be salvaged: only a salvage and a purge come to these."""
    if record and record.laid_down:
        raise Refused("laid_down", "it is laid down to be salvaged: nobody freezes it, copies it or lets anybody in")


def check_boot(boot_id: str, here: str) -> None:
    """Raise Refused if the order is for another life of this container. Either is empty where nobody has said it."""
    if boot_id and here and boot_id != here:
        raise Refused("other_boot", "it is for another life of this worker's container")


class Ledger:
    """The records, one file each, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._living = folder
        self._tombstones = folder / "tombstones"
        self._locks = folder / "locks"
        for place in (self._living, self._tombstones, self._locks):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def locked(self, rental_id: str, wait_s: float) -> Iterator[int]:
        """One at a time for each rental; a long purge of one holds up no other. Refused after `wait_s`.

        Gives the lock's descriptor: a program that inherits it holds the lock for as long as it runs.
        """
        with opened_lock(self._locks / rental_id) as lock:
            if not got_lock(lock, wait_s):
                raise Refused("busy", "another command for this rental is still at work; try again")
            yield lock

    def living(self, rental_id: str) -> Record | None:
        try:
            record = Record(**json.loads((self._living / f"{rental_id}.json").read_text()))
        except FileNotFoundError:
            return None
        return record if record.epoch > self.purged_epoch(rental_id) else None

    def purged_epoch(self, rental_id: str) -> int:
        try:
            return int((self._tombstones / rental_id).read_text())
        except FileNotFoundError:
            return 0

    def all_living(self) -> list[Record]:
        records = (self.living(file.stem) for file in sorted(self._living.glob("*.json")))
        return [record for record in records if record]

    def keep(self, record: Record) -> None:
        write_whole(self._living / f"{record.rental_id}.json", json.dumps(asdict(record)))

    def bury(self, record: Record) -> None:
        """The tombstone first: a crash between the two leaves a record that `living` no longer shows."""
        epoch = max(record.epoch, self.purged_epoch(record.rental_id))
        write_whole(self._tombstones / record.rental_id, str(epoch))
        (self._living / f"{record.rental_id}.json").unlink(missing_ok=True)


def write_whole(file: Path, text: str, mode: int = 0o600, group: int = -1) -> None:
    """The file holds the whole text or what it held before, whenever the machine stops."""
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        os.fchown(descriptor, -1, group)
        os.fchmod(descriptor, mode)
        stream.write(text)
        stream.flush()
        os.fsync(descriptor)
    new.replace(file)
