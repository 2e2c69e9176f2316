#!/usr/bin/python3 -Es
"""The one program that makes, locks, unlocks and purges a rental on its worker, and keeps its epoch.

    orion-rental create|lock|unlock|purge|inventory  < request.json  > report.json

The agent and Ansible's module both call it; it may be run by hand. Exit status: 0 done, 2 the request is not
understood, 3 refused, 4 something of a purged rental is left. The report of a failure has `error` and `code`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accounts
import processes
import traces
from ledger import Ledger, Record, Refused, check_create, check_not_newer, check_unlock, write_whole

FIRST_UID = 100_000
LOCK_WAIT_S = 20.0
SWEEPS = 3
"""A name may be passed over while its directory changes: an empty sweep ends the work, so many at most."""

Report = dict[str, Any]
_PUBLIC_KEY = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/]{20,8000}={0,3}( [\x20-\x7e]{0,200})?")


@dataclass(frozen=True)
class Request:
    rental_id: str
    epoch: int
    username: str = ""
    uid: int = 0
    public_keys: tuple[str, ...] = ()
    kill: bool = False
    deadline: float | None = None
    """Unix time after which the order is void: who gave it has given up."""


@dataclass(frozen=True)
class Places:
    """Where things are; `root` is another directory in tests."""

    root: Path = Path("/")

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    @property
    def keys(self) -> Path:
        """What sshd reads, as the renter: hence 0711."""
        return self.root / "etc/orion/keys"

    @property
    def locked_keys(self) -> Path:
        """Beside it, on the same file system, so that locking is one rename."""
        return self.root / "etc/orion/locked"

    @property
    def app_address(self) -> Path:
        return self.root / "etc/orion/app_address"

    @property
    def homes(self) -> Path:
        return self.root / "home"


class Rentals:
    """The commands. Each may be repeated, and may be killed at any instant and then repeated."""

    def __init__(self, places: Places | None = None, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self._places = places or Places()
        self._lock_wait_s = lock_wait_s
        self.ledger = Ledger(self._places.root / "var/lib/orion/rentals")
        self._places.keys.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._places.locked_keys.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, request: Request) -> Report:
        """Account, home and keys exist, locked unless this very epoch was unlocked before."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            record = self.ledger.living(request.rental_id)
            check_create(record, self.ledger.purged_epoch(request.rental_id), request.epoch)
            self._check_names(request, record)
            changed = False
            if record is None or record.epoch < request.epoch:
                self._forget_keys(request.username)
                self.ledger.keep(Record(request.rental_id, request.username, request.uid, request.epoch))
                changed = True
            changed |= accounts.add(self._places.etc, request.username, request.uid)
            changed |= self._make_home(request)
            changed |= self._write_keys(request)
            return {"changed": changed, "epoch": request.epoch, "state": self._state(request.username)}

    def unlock(self, request: Request) -> Report:
        """Its keys are where sshd looks."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            record = self.ledger.living(request.rental_id)
            check_unlock(record, self.ledger.purged_epoch(request.rental_id), request.epoch)
            assert record is not None  # noqa: S101 - check_unlock has refused it
            changed = self._move_keys(self._places.locked_keys, self._places.keys, record.username)
            if self._state(record.username) == "locked":
                raise Refused("unknown_rental", "its keys are not here: it was not created at this epoch")
            return {"changed": changed, "epoch": record.epoch, "state": "running"}

    def lock(self, request: Request) -> Report:
        """Its keys are where sshd does not look; with `kill`, its processes are ended."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            record = self.ledger.living(request.rental_id)
            check_not_newer(record, request.epoch)
            if record is None:
                return {"changed": False, "state": "absent", "killed": 0}
            changed = self._move_keys(self._places.keys, self._places.locked_keys, record.username)
            killed = processes.end({record.uid: record.username}) if request.kill else 0
            return {"changed": changed or killed > 0, "state": "locked", "killed": killed}

    def purge(self, request: Request) -> Report:
        """Nothing of it is left, and the report says so after looking. The epoch never comes back here."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            before = self.ledger.living(request.rental_id)
            check_not_newer(before, request.epoch)
            self._check_names(request, before)
            ending = Record(request.rental_id, request.username, request.uid, request.epoch, ending=True)
            self.ledger.keep(ending)
            self._forget_keys(request.username)
            renter = {request.uid: request.username}
            killed = processes.end(renter)
            accounts.remove(self._places.etc, request.username, request.uid)
            killed += processes.end(renter)  # a log-in that was under way when the keys went
            removed = self._remove_traces(request) + traces.remove_ipc(request.uid)
            report = self._look_again(request)
            if not report["left"]:
                self.ledger.bury(ending)
            changed = before is not None or killed + removed > 0
            return {"changed": changed, "removed_files": removed, "killed": killed, **report}

    def inventory(self) -> list[dict[str, Any]]:
        """The rentals that have something here, as the contract wants them."""
        return [
            {
                "rental_id": record.rental_id,
                "username": record.username,
                "uid": record.uid,
                "epoch": record.epoch,
                "state": self._state(record.username),
            }
            for record in self.ledger.all_living()
        ]

    def shut(self, record: Record) -> None:
        """Lock at once, whatever other command is at work on it: one rename, harmless between any two steps."""
        self._move_keys(self._places.keys, self._places.locked_keys, record.username)

    def _check_names(self, request: Request, record: Record | None) -> None:
        """A rental keeps its name and number for ever; nothing is done to another's by a mistaken order."""
        same = (request.username, request.uid)
        if record and (record.username, record.uid) != same:
            raise Refused("conflict", f"this rental is {record.username}, uid {record.uid}, here")
        others = (each for each in self.ledger.all_living() if each.rental_id != request.rental_id)
        if any(request.username == each.username or request.uid == each.uid for each in others):
            raise Refused("conflict", f"{request.username} or uid {request.uid} is another rental's here")
        if accounts.taken_by_another(self._places.etc, *same):
            raise Refused("conflict", f"{request.username} or uid {request.uid} is another account's here")

    def _make_home(self, request: Request) -> bool:
        """Empty, so that a copy of the rental's files can be put into it."""
        home = self._places.homes / request.username
        with suppress(FileExistsError):
            home.mkdir(mode=0o700)
        folder = os.open(home, traces.OPEN_FOLDER)
        try:
            if os.fstat(folder).st_uid == request.uid:
                return False
            os.fchmod(folder, 0o700)
            os.fchown(folder, request.uid, request.uid)
        finally:
            os.close(folder)
        return True

    def _write_keys(self, request: Request) -> bool:
        """Each key counts only from the app's address: people come in through the manager's relay."""
        source = self._places.app_address.read_text().strip()
        text = "".join(f'from="{source}" {key}\n' for key in request.public_keys)
        running = self._state(request.username) == "running"
        file = (self._places.keys if running else self._places.locked_keys) / request.username
        if file.exists() and file.read_text() == text:
            return False
        write_whole(file, text, mode=0o640, group=request.uid)
        return True

    def _state(self, username: str) -> str:
        return "running" if (self._places.keys / username).exists() else "locked"

    def _forget_keys(self, username: str) -> None:
        for folder in (self._places.keys, self._places.locked_keys):
            (folder / username).unlink(missing_ok=True)

    def _move_keys(self, source: Path, target: Path, username: str) -> bool:
        try:
            (source / username).replace(target / username)
        except FileNotFoundError:
            return False
        return True

    def _remove_traces(self, request: Request) -> int:
        removed = 0
        for place in traces.by_name(self._places.root, request.username):
            folder = os.open(place.parent, traces.OPEN_FOLDER)
            with suppress(OSError):
                removed += traces.remove_entry(folder, place.name)
            os.close(folder)
        for mount in self._mounts():
            for _ in range(SWEEPS):
                found = [traces.remove(each) for each in traces.owned(mount, request.uid, [])]
                removed += sum(found)
                if not found:
                    break
        return removed

    def _look_again(self, request: Request) -> Report:
        left = [f"process {pid} ({processes.name_of(pid)})" for pid in processes.of([request.uid])]
        left += [f"log-in {pid}" for pid in processes.log_ins([request.username])]
        left += [f"line in {file}" for file in accounts.found(self._places.etc, request.username, request.uid)]
        left += [f"file {place}" for place in traces.by_name(self._places.root, request.username)]
        left += [f"IPC {kind} {number}" for kind, number in traces.ipc(request.uid)]
        unsearched: list[str] = []
        mounts = self._mounts()
        for mount in mounts:
            left += [f"file {found.path[:300]}" for found in traces.owned(mount, request.uid, unsearched)]
        looked = ["processes", "accounts", "System V IPC", "keys, mail, cron, at", *mounts]
        return {"left": left[:50], "looked": looked, "unsearched": unsearched[:50]}

    def _mounts(self) -> list[str]:
        if self._places.root != Path("/"):
            return [str(self._places.root)]
        return traces.writable_mounts(Path("/proc/self/mountinfo").read_text())


def parse(command: str, text: str) -> Request:
    """The request of a command. Raises ValueError, in words for a person."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("the request must be a JSON object")
    unknown = set(data) - set(Request.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    data = {name: value for name, value in data.items() if value is not None}
    request = Request(**{**data, "public_keys": tuple(data.get("public_keys", ()))})
    _check(re.fullmatch(r"[a-z0-9-]{1,64}", request.rental_id), "rental_id is not an id")
    _check(type(request.epoch) is int and request.epoch >= 1, "epoch must be a whole number from 1")
    if command in ("create", "purge"):
        _check(re.fullmatch(r"r-[a-z0-9]{1,30}", request.username), "username must be r- and an id")
        _check(type(request.uid) is int and FIRST_UID <= request.uid < 2**31, f"uid must be from {FIRST_UID}")
    if command == "create":
        _check(request.public_keys, "public_keys is empty")
        _check(all(map(_PUBLIC_KEY.fullmatch, request.public_keys)), "public_keys must be plain public keys")
    return request


def answer(command: str, text: str, rentals: Rentals, now: float) -> tuple[int, Report]:
    """Exit status and report of one call. `now`: Unix time."""
    if command == "inventory":
        return 0, {"changed": False, "rentals": rentals.inventory()}
    try:
        request = parse(command, text)
    except (ValueError, TypeError) as error:
        return 2, {"changed": False, "error": f"request not understood: {error}", "code": "invalid_request"}
    commands: dict[str, Callable[[Request], Report]] = {
        "create": rentals.create,
        "lock": rentals.lock,
        "unlock": rentals.unlock,
        "purge": rentals.purge,
    }
    try:
        if request.deadline is not None and now > request.deadline:
            raise Refused("deadline_passed", "its deadline has passed: who ordered it no longer waits for it")
        report = commands[command](request)
    except Refused as refusal:
        return 3, {"changed": False, "error": str(refusal), "code": refusal.code}
    if report.get("left"):
        return 4, {**report, "error": "something of the rental is left on the worker", "code": "left_behind"}
    return 0, report


def _check(truth: object, message: str) -> None:
    if not truth:
        raise ValueError(message)


def main() -> int:
    names = ("create", "lock", "unlock", "purge", "inventory")
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        print(f"usage: orion-rental {'|'.join(names)} < request.json", file=sys.stderr)  # noqa: T201
        return 2
    command = sys.argv[1]
    text = "" if command == "inventory" else sys.stdin.read()
    status, report = answer(command, text, Rentals(), time.time())
    print(json.dumps(report))  # noqa: T201 - the report is the program's output
    return status


if __name__ == "__main__":
    sys.exit(main())
