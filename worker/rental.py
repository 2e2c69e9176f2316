#!/usr/bin/python3 -ES
"""The one program that makes, locks, freezes, thaws, unlocks and purges a rental on its worker, and keeps its epoch.

    orion-rental run|create|certify|lock|unlock|freeze|thaw|purge|inventory  < request.json  > report.json
    orion-rental serve                                               < requests, one a line  > answers, one a line
    orion-rental send|salvage|receive                                a line of JSON, then rsync's bytes: see files.py

The agent and Ansible's module both call it; it may be run by hand. A request is about one rental, or about several:
`{"rentals": [request, ...]}`, whose report has one report for each, under `rentals`, in their order. Exit status: 0
done, 2 the request is not understood, 3 refused, 4 something of a purged rental is left, and of several rentals the
highest. The report of a failure has `error` and `code`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accounts
import files
import processes
import standing
import traces
from freezing import Freezer
from handing import PLACE
from host_certificate import HostCertificate, read_certificate
from launching import MARK, Launcher, is_command, told_of_itself
from ledger import (
    Ledger,
    Record,
    Refused,
    check_boot,
    check_create,
    check_not_laid_down,
    check_not_newer,
    check_unlock,
    write_whole,
)
from snapshot import Manifests, remove_tree

FIRST_UID = 100_000
LOCK_WAIT_S = 20.0
FREEZING_WAIT_S = 5.0
COMMANDS = ("run", "create", "certify", "lock", "unlock", "freeze", "thaw", "purge")
SWEEPS = 3
"""A name may be passed over while its directory changes: an empty sweep ends the work, so many at most."""

Report = dict[str, Any]
_RENTAL_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_PUBLIC_KEY = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/]{20,8000}={0,3}( [\x20-\x7e]{0,200})?")


@dataclass(frozen=True)
class Request:
    rental_id: str
    epoch: int
    username: str = ""
    uid: int = 0
    public_keys: tuple[str, ...] = ()
    rental_name: str = ""
    """The name that the rental's sessions are told; empty: the one that an earlier order told, if one did."""
    user_authority: str = ""
    """The key that signs certificates for renters; empty: there are none."""
    host_certificate: str = ""
    """What sshd shows from now on, in which this rental is named; empty: as before."""
    kill: bool = False
    start: str = ""
    """The start command, to run when its renter is let in; `start_mark` says which run of it: see launching.py."""
    start_mark: str = ""
    deadline: float | None = None
    """Unix time after which the order is void: who gave it has given up."""
    move: int = 0
    """For freeze and thaw: the planned move that it is for, by a number that only rises for a rental."""
    boot_id: str = ""
    """The life of this container that the order is for; empty: any."""


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

    @property
    def aside(self) -> Path:
        """Where files of rentals are set aside for a snapshot: root's, and on the file system of the homes.

        Not below /var/lib/orion, which is closed to those who send them.
        """
        return self.root / "var/lib/orion-aside"


class Rentals:
    """The commands. Each may be repeated, and may be killed at any instant and then repeated."""

    def __init__(self, places: Places | None = None, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self._places = places or Places()
        self._lock_wait_s = lock_wait_s
        self.ledger = Ledger(self._places.root / "var/lib/orion/rentals")
        self.freezer = Freezer(self._places.root)
        self.launcher = Launcher(self._places.root)
        self.manifests = Manifests(self._places.root)
        self._certificate = HostCertificate(self._places.root)
        self._places.keys.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._places.locked_keys.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, request: Request) -> Report:
        """Account, home and keys exist, locked unless this very epoch was unlocked before."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            record = self.ledger.living(request.rental_id)
            check_create(record, self.ledger.purged_epoch(request.rental_id), request.epoch)
            self._check_names(request, record)
            changed = False
            name = request.rental_name or (record.rental_name if record else "")
            if record is None or record.epoch < request.epoch:
                self._forget_keys(request.username)
                who = request.rental_id, request.username, request.uid, request.epoch
                self.ledger.keep(Record(*who, rental_name=name))
                changed = True
            elif record.rental_name != name or record.laid_down:
                # A manager that went back to a backup has it run on here: it is not lost any more.
                self.ledger.keep(replace(record, rental_name=name, laid_down=False))
                changed = True
            changed |= accounts.add(self._places.etc, request.username, request.uid)
            changed |= self._make_home(request)
            changed |= self._write_keys(request, name)
            changed |= self._install(request)
            restored = {"restored": record.restored} if record and record.epoch == request.epoch else {}
            return {"changed": changed, "epoch": request.epoch, "state": self._shown(request), **restored}

    def certify(self, request: Request) -> Report:
        """sshd shows this certificate, or one that was signed later."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            record = self.ledger.living(request.rental_id)
            check_unlock(record, self.ledger.purged_epoch(request.rental_id), request.epoch)
            changed = self._install(request)
        self._certificate.show()
        return {"changed": changed, "epoch": request.epoch, "state": self._shown(record or request)}

    def unlock(self, request: Request) -> Report:
        """Its keys are where sshd looks."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            record = self._going_on(request)
            if self.freezer.is_frozen(record.rental_id):
                raise Refused("frozen", "it is frozen: thaw it")
            return {"changed": self._let_in(record), "epoch": record.epoch, "state": "running"}

    def freeze(self, request: Request) -> Report:
        """Nobody is let in, and nothing of it goes on, until it is thawed; its processes and files are kept."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            record = self.ledger.living(request.rental_id)
            check_not_newer(record, request.epoch)
            check_not_laid_down(record)
            if record is None:
                return {"changed": False, "state": "absent", "killed": 0}
            self.shut(record)
            changed, killed = self.freezer.freeze(record, _boot_time_s(), move=request.move)
            return {"changed": changed, "epoch": record.epoch, "state": "frozen", "killed": killed}

    def thaw(self, request: Request, asked_at: float | None = None) -> Report:
        """It goes on, and its renter is let in. `asked_at`: when the call was sent whose reply says so."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            record = self._going_on(request)
            changed = self.freezer.thaw(record, asked_at, request.move)
            return {"changed": self._let_in(record) or changed, "epoch": record.epoch, "state": "running"}

    def run(self, request: Request) -> Report:
        """Created, then unlocked, then its start command runs: steps that each look at the epoch anew.

        Nobody is let in before sshd can show whose worker it is.
        """
        created = self.create(request)
        if request.host_certificate:
            self._certificate.show()
        unlocked = self.unlock(request)
        started = self._start(request) if request.start else {}
        changed = created["changed"] or unlocked["changed"] or bool(started)
        return {**unlocked, **started, "changed": changed}

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

    def purge(self, requests: Sequence[Request]) -> list[Report | Refused]:
        """Nothing of these rentals is left, and each report says so after looking. The epochs never come back here.

        They are different ones, and share what takes long: two searches of the whole file system.
        """
        found: dict[str, Report | Refused] = {}
        with ExitStack() as locks:
            purged = []
            for request in sorted(requests, key=lambda each: each.rental_id):  # in the same order as anybody else
                try:
                    locks.enter_context(self.ledger.locked(request.rental_id, self._lock_wait_s))
                    before = self.ledger.living(request.rental_id)
                    check_not_newer(before, request.epoch)
                    self._check_names(request, before)
                except Refused as refusal:
                    found[request.rental_id] = refusal
                else:
                    self.ledger.keep(_ending(request))
                    purged.append(request)
                    found[request.rental_id] = {"changed": before is not None}
            for request, report in zip(purged, self._purge(purged), strict=True):
                if not report["left"]:
                    self.ledger.bury(_ending(request))
                known = found[request.rental_id]
                assert isinstance(known, dict)  # noqa: S101 - only what was not refused is purged
                changed = known["changed"] or report["killed"] + report["removed_files"] > 0
                found[request.rental_id] = {**report, "changed": changed}
        return [found[request.rental_id] for request in requests]

    def inventory(self) -> list[dict[str, Any]]:
        """The rentals that have something here, as the contract wants them."""
        return [
            {
                "rental_id": record.rental_id,
                "username": record.username,
                "uid": record.uid,
                "epoch": record.epoch,
                "state": self._shown(record),
            }
            for record in self.ledger.all_living()
        ]

    def shut(self, record: Record) -> None:
        """Lock at once, whatever other command is at work on it: one rename, harmless between any two steps."""
        self._move_keys(self._places.keys, self._places.locked_keys, record.username)

    def begin(self) -> None:
        """At the start of the container: what was set aside for a transfer is of no use any more."""
        remove_tree(self._places.aside)

    def hold_over(self, record: Record, what: str) -> bool:
        """Freeze it because its home holds too much; False while it may make room, having been thawed for that."""
        with self.ledger.locked(record.rental_id, self._lock_wait_s):
            now = self.ledger.living(record.rental_id)
            if now is None or now.epoch != record.epoch or self.freezer.is_spared(record, _boot_time_s()):
                return False
            self.shut(record)
            self.freezer.freeze(record, None, over=what)
            return True

    def lay_down(self, record: Record) -> None:
        """Nothing of it runs, nobody is let in, and nothing that reads its files is stopped. With the rental's lock.

        It is written down first, so that neither an order nor the fence freezes it again, nor lets it go on.
        """
        self.ledger.keep(replace(record, laid_down=True))
        self.shut(record)
        processes.end({record.uid: record.username})
        with self.freezer.locked(FREEZING_WAIT_S):
            self.freezer.forget(record.rental_id)

    def _going_on(self, request: Request) -> Record:
        """Return the record of a rental that may go on here at exactly this epoch. With the rental's lock."""
        record = self.ledger.living(request.rental_id)
        check_unlock(record, self.ledger.purged_epoch(request.rental_id), request.epoch)
        check_not_laid_down(record)
        assert record is not None  # noqa: S101 - check_unlock has refused it
        return record

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

    def _write_keys(self, request: Request, name: str) -> bool:
        """Each key counts only from the app's address: people come in through the manager's relay."""
        source = self._places.app_address.read_text().strip()
        told = told_of_itself(request.rental_id, name).items()
        limits = ",".join([f'from="{source}"', *(f'environment="{variable}={value}"' for variable, value in told)])
        text = "".join(f"{limits} {key}\n" for key in request.public_keys)
        if request.user_authority:
            # In the same file, so that what shuts out the keys shuts out certificates in the same step.
            principal = f"{request.rental_id}-{request.epoch}"
            text += f'cert-authority,principals="{principal}",{limits} {request.user_authority}\n'
        running = self._state(request.username) == "running"
        file = (self._places.keys if running else self._places.locked_keys) / request.username
        if file.exists() and file.read_text() == text:
            return False
        write_whole(file, text, mode=0o640, group=request.uid)
        return True

    def _install(self, request: Request) -> bool:
        return bool(request.host_certificate) and self._certificate.install(request.host_certificate, time.time())

    def _let_in(self, record: Record) -> bool:
        """Unless the lease ends meanwhile: whichever of the two looks last finds what the other did.

        It looks first as well: the fence freezes whoever was let in, and only a reply to a running rental thaws.
        """
        self._check_lease()
        places = (self._places.locked_keys, self._places.keys)
        if not any((place / record.username).exists() for place in places):
            raise Refused("unknown_rental", "its keys are not here: it was not created at this epoch")
        if not record.let_in:
            self.ledger.keep(replace(record, let_in=True))  # before the keys: see files.py
        changed = self._move_keys(*places, record.username)
        try:
            self._check_lease()
        except Refused:
            self.shut(record)
            raise
        return changed

    def _check_lease(self) -> None:
        if not self.freezer.has_lease:
            raise Refused("no_lease", "this worker has no lease: nobody is let in")

    def _start(self, request: Request) -> Report:
        """Under a lease, as whoever is let in: what starts as that ends is stopped by the fence's next look."""
        with self.ledger.locked(request.rental_id, self._lock_wait_s):
            record = self._going_on(request)
            self._check_lease()
            if self.freezer.is_frozen(record.rental_id):
                raise Refused("no_lease", "it was frozen meanwhile: nothing of it may run")
            return self.launcher.launch(record, request.start, request.start_mark)

    def _shown(self, of: Record | Request) -> str:
        return "frozen" if self.freezer.is_frozen(of.rental_id) else self._state(of.username)

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

    def _purge(self, requests: Sequence[Request]) -> list[Report]:
        if not requests:
            return []
        killed, removed = dict.fromkeys(requests, 0), dict.fromkeys(requests, 0)
        for request in requests:
            renter = {request.uid: request.username, files.sender_of(request.uid): request.username}
            self._forget_keys(request.username)
            killed[request] += processes.end(renter)
            accounts.remove(self._places.etc, request.username, request.uid)
            killed[request] += processes.end(renter)  # a log-in that was under way when the keys went
            self.freezer.forget_purged(request.rental_id)
            self.launcher.forget(request.rental_id)
            self.manifests.forget(request.rental_id)
            with suppress(Refused):  # what stays is found below
                files.forget_aside(self._places.aside, request.rental_id)
            removed[request] += self._remove_named(request) + traces.remove_ipc(request.uid)
        for uid, number in self._remove_owned({request.uid for request in requests}).items():
            removed[next(each for each in requests if each.uid == uid)] += number
        return [
            {"removed_files": removed[each], "killed": killed[each], **report}
            for each, report in zip(requests, self._look_again(requests), strict=True)
        ]

    def _remove_named(self, request: Request) -> int:
        removed = 0
        for place in traces.by_name(self._places.root, request.username):
            folder = os.open(place.parent, traces.OPEN_FOLDER)
            with suppress(OSError):
                removed += traces.remove_entry(folder, place.name)
            os.close(folder)
        return removed

    def _remove_owned(self, uids: Collection[int]) -> Counter[int]:
        removed: Counter[int] = Counter()
        for mount in self._mounts():
            for _ in range(SWEEPS):
                found = [(each.uid, traces.remove(each)) for each in traces.owned(mount, uids, [])]
                for uid, number in found:
                    removed[uid] += number
                if not found:
                    break
        return removed

    def _look_again(self, requests: Sequence[Request]) -> list[Report]:
        unsearched: list[str] = []
        owned: dict[int, list[str]] = {request.uid: [] for request in requests}
        mounts = self._mounts()
        for mount in mounts:
            for found in traces.owned(mount, owned.keys(), unsearched):
                owned[found.uid].append(f"file {found.path[:300]}")
        looked = ["processes", "accounts", "System V IPC", "keys, mail, cron, at", *mounts]
        return [
            {"left": (self._found(each) + owned[each.uid])[:50], "looked": looked, "unsearched": unsearched[:50]}
            for each in requests
        ]

    def _found(self, request: Request) -> list[str]:
        left = [f"process {pid} ({processes.name_of(pid)})" for pid in processes.of([request.uid])]
        left += [f"log-in {pid}" for pid in processes.log_ins([request.username])]
        left += [f"line in {file}" for file in accounts.found(self._places.etc, request.username, request.uid)]
        named = [*traces.by_name(self._places.root, request.username), self._places.aside / request.rental_id]
        left += [f"file {place}" for place in named if os.path.lexists(place)]
        return left + [f"IPC {kind} {number}" for kind, number in traces.ipc(request.uid)]

    def _mounts(self) -> list[str]:
        if self._places.root != Path("/"):
            return [str(self._places.root)]
        return traces.writable_mounts(Path("/proc/self/mountinfo").read_text())


def parse(command: str, text: str) -> Request:
    """The request of a command. Raises ValueError, in words for a person."""
    return _understood(command, json.loads(text))


def answer(command: str, text: str, rentals: Rentals, now: float) -> tuple[int, Report]:
    """Exit status and report of one call. `now`: Unix time."""
    if command == "inventory":
        return 0, {"changed": False, "rentals": rentals.inventory()}
    try:
        asked = json.loads(text)
    except ValueError as error:
        return _not_understood(error)
    if not (isinstance(asked, dict) and "rentals" in asked):
        return _answer_one(command, asked, rentals, now)
    several = asked["rentals"]
    if not (isinstance(several, list) and several and len(asked) == 1):
        return _not_understood("rentals must be a list of requests, and alone")
    answers = _answer_all(command, several, rentals, now)
    reports = [report for _, report in answers]
    whole: Report = {"changed": any(report["changed"] for report in reports), "rentals": reports}
    first = next((report for status, report in answers if status), None)
    failure = {"error": first["error"], "code": first["code"]} if first else {}
    return max(status for status, _ in answers), whole | failure


def _answer_all(command: str, several: list[object], rentals: Rentals, now: float) -> list[tuple[int, Report]]:
    """One after the other, but a purge of several is one."""
    names = [one.get("rental_id") if isinstance(one, dict) else None for one in several]
    if command != "purge" or len(set(map(str, names))) < len(names):
        return [_answer_one(command, one, rentals, now) for one in several]
    answers = [_request(command, one, rentals, now) for one in several]
    reports = iter(rentals.purge([each for each in answers if isinstance(each, Request)]))
    return [_purged(next(reports)) if isinstance(each, Request) else each for each in answers]


def _answer_one(command: str, asked: object, rentals: Rentals, now: float) -> tuple[int, Report]:
    commands: dict[str, Callable[[Request], Report]] = {
        "run": rentals.run,
        "create": rentals.create,
        "certify": rentals.certify,
        "lock": rentals.lock,
        "unlock": rentals.unlock,
        "freeze": rentals.freeze,
        "thaw": rentals.thaw,
    }
    request = _request(command, asked, rentals, now)
    if not isinstance(request, Request):
        return request
    if command == "purge":
        return _purged(*rentals.purge([request]))
    try:
        return 0, commands[command](request)
    except Refused as refusal:
        return _refused(refusal)


def _request(command: str, asked: object, rentals: Rentals, now: float) -> Request | tuple[int, Report]:
    """What was asked for, or what there is to answer at once."""
    try:
        request = _understood(command, asked)
    except (ValueError, TypeError) as error:
        return _not_understood(error)
    if request.deadline is not None and now > request.deadline:
        late = Refused("deadline_passed", "its deadline has passed: who ordered it no longer waits for it")
        return _refused(late)
    try:
        check_boot(request.boot_id, rentals.launcher.boot_id)
    except Refused as refusal:
        return _refused(refusal)
    return request


def _purged(report: Report | Refused) -> tuple[int, Report]:
    if isinstance(report, Refused):
        return _refused(report)
    if report["left"]:
        return 4, {**report, "error": "something of the rental is left on the worker", "code": "left_behind"}
    return 0, report


def _refused(refusal: Refused) -> tuple[int, Report]:
    return 3, {"changed": False, "error": str(refusal), "code": refusal.code}


def _not_understood(reason: object) -> tuple[int, Report]:
    return 2, {"changed": False, "error": f"request not understood: {reason}", "code": "invalid_request"}


def _understood(command: str, data: object) -> Request:
    if not isinstance(data, dict):
        raise ValueError("the request must be a JSON object")
    unknown = set(data) - set(Request.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    data = {name: value for name, value in data.items() if value is not None}
    request = Request(**{**data, "public_keys": tuple(data.get("public_keys", ()))})
    _check(re.fullmatch(r"[a-z0-9-]{1,64}", request.rental_id), "rental_id is not an id")
    _check(type(request.epoch) is int and request.epoch >= 1, "epoch must be a whole number from 1")
    _check(type(request.move) is int and request.move >= 0, "move must be a whole number from 0")
    _check(isinstance(request.boot_id, str), "boot_id must be a text")
    if command in ("run", "create", "purge"):
        _check(re.fullmatch(r"r-[a-z0-9]{1,30}", request.username), "username must be r- and an id")
        _check(type(request.uid) is int and FIRST_UID <= request.uid < 2**31, f"uid must be from {FIRST_UID}")
    if command in ("run", "create"):
        _check(request.public_keys, "public_keys is empty")
        _check(all(map(_PUBLIC_KEY.fullmatch, request.public_keys)), "public_keys must be plain public keys")
        _check(not request.rental_name or _RENTAL_NAME.fullmatch(request.rental_name), "rental_name is no name")
        _check(not request.start or is_command(request.start), "start must be one line of printable characters")
        _check(not request.start or MARK.fullmatch(request.start_mark), "start_mark must be RUN@BOOT")
    if command == "certify":
        _check(request.host_certificate, "host_certificate is empty")
    if request.host_certificate:
        read_certificate(request.host_certificate)
    if request.user_authority:
        _check(_PUBLIC_KEY.fullmatch(request.user_authority), "user_authority must be a plain public key")
    return request


def _ending(request: Request) -> Record:
    return Record(request.rental_id, request.username, request.uid, request.epoch, ending=True)


def _boot_time_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _check(truth: object, message: str) -> None:
    if not truth:
        raise ValueError(message)


def main() -> int:
    names = (*COMMANDS, "inventory", "serve", *files.TRANSFERS)
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        print(f"usage: orion-rental {'|'.join(names)} < request.json", file=sys.stderr)  # noqa: T201
        return 2
    command = sys.argv[1]
    if command == "serve":
        transfers = standing.Transfers(Path(PLACE), _carry_now)
        standing.serve(_answer_now, COMMANDS, sys.stdin.fileno(), sys.stdout.fileno(), transfers)
        return 0
    if command in files.TRANSFERS:
        return _carry_now(command)
    text = "" if command == "inventory" else sys.stdin.read()
    status, report = _answer_now(command, text)
    print(json.dumps(report))  # noqa: T201 - the report is the program's output
    return status


def _answer_now(command: str, text: str) -> tuple[int, Report]:
    return answer(command, text, Rentals(), time.time())


def _carry_now(direction: str) -> int:
    places = Places()
    return files.carry(direction, Rentals(places), places.aside, places.homes)


if __name__ == "__main__":
    sys.exit(main())
