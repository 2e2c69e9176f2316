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

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from orion.rental_order import RentalOrder
from orion_worker.freezer.marks import Freezer
from orion_worker.records import (
    RentalRecord,
    RentalRecords,
    RequestRefused,
    check_create,
    check_not_newer,
    check_not_retired,
    check_unlock,
)
from orion_worker.rental import accounts
from orion_worker.rental.host_certificate import HostCertificate
from orion_worker.rental.keys import KeyFiles
from orion_worker.rental.paths import WorkerPaths
from orion_worker.rental.purge import Purger
from orion_worker.rental.requests import Report
from orion_worker.snapshots.manifests import Manifests
from orion_worker.start.launcher import Launcher, rental_variables
from orion_worker.system import processes, trees
from orion_worker.system.trees import remove_tree

LOCK_WAIT_S = 20.0
FREEZING_WAIT_S = 5.0


class Rentals:
    """The commands. Each may be repeated, and may be killed at any instant and then repeated."""

    def __init__(self, paths: WorkerPaths | None = None, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self._paths = paths or WorkerPaths()
        self._lock_wait_s = lock_wait_s
        self.records = RentalRecords(self._paths.root / "var/lib/orion/rentals")
        self.freezer = Freezer(self._paths.root)
        self.launcher = Launcher(self._paths.root)
        self.manifests = Manifests(self._paths.root)
        self._keys = KeyFiles(self._paths)
        self._purger = Purger(self._paths, self._keys, self.freezer, self.launcher, self.manifests)
        self._certificate = HostCertificate(self._paths.root)

    def create(self, request: RentalOrder) -> Report:
        """Account, home and keys exist, locked unless this very epoch was unlocked before."""
        with self.records.locked(request.rental_id, self._lock_wait_s):
            record = self.records.find(request.rental_id)
            check_create(record, self.records.purged_epoch(request.rental_id), request.epoch)
            self._check_names(request, record)
            changed = False
            name = request.rental_name or (record.rental_name if record else "")
            if record is None or record.epoch < request.epoch:
                self._keys.forget(request.username)
                who = request.rental_id, request.username, request.uid, request.epoch
                self.records.save(RentalRecord(*who, rental_name=name))
                changed = True
            elif record.rental_name != name or record.retired:
                # A manager that went back to a backup has it run on here: it is not lost any more.
                self.records.save(replace(record, rental_name=name, retired=False))
                changed = True
            changed |= accounts.add(self._paths.etc, request.username, request.uid)
            changed |= self._make_home(request)
            changed |= self._write_keys(request, name)
            changed |= self._install(request)
            restored = {"restored": record.restored} if record and record.epoch == request.epoch else {}
            return {"changed": changed, "epoch": request.epoch, "state": self._state_of(request), **restored}

    def certify(self, request: RentalOrder) -> Report:
        """sshd shows this certificate, or one that was signed later."""
        with self.records.locked(request.rental_id, self._lock_wait_s):
            record = self.records.find(request.rental_id)
            check_unlock(record, self.records.purged_epoch(request.rental_id), request.epoch)
            changed = self._install(request)
        self._certificate.show()
        return {"changed": changed, "epoch": request.epoch, "state": self._state_of(record or request)}

    def unlock(self, request: RentalOrder) -> Report:
        """Its keys are where sshd looks."""
        with self.records.locked(request.rental_id, self._lock_wait_s):
            record = self._current_record(request)
            if self.freezer.is_frozen(record.rental_id):
                raise RequestRefused("frozen", "it is frozen: thaw it")
            return {"changed": self._activate(record), "epoch": record.epoch, "state": "running"}

    def freeze(self, request: RentalOrder) -> Report:
        """Nobody is let in, and nothing of it goes on, until it is thawed; its processes and files are kept."""
        with self.records.locked(request.rental_id, self._lock_wait_s):
            record = self.records.find(request.rental_id)
            check_not_newer(record, request.epoch)
            check_not_retired(record)
            if record is None:
                return {"changed": False, "state": "absent", "killed": 0}
            self.lock_at_once(record)
            changed, killed = self.freezer.freeze(record, _boot_time_s(), migration=request.move)
            return {"changed": changed, "epoch": record.epoch, "state": "frozen", "killed": killed}

    def thaw(self, request: RentalOrder, requested_at: float | None = None) -> Report:
        """It goes on, and its renter is let in. `requested_at`: when the call was sent whose reply says so."""
        with self.records.locked(request.rental_id, self._lock_wait_s):
            record = self._current_record(request)
            changed = self.freezer.thaw(record, requested_at, request.move)
            return {"changed": self._activate(record) or changed, "epoch": record.epoch, "state": "running"}

    def run(self, request: RentalOrder) -> Report:
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

    def lock(self, request: RentalOrder) -> Report:
        """Its keys are where sshd does not look; with `kill`, its processes are ended."""
        with self.records.locked(request.rental_id, self._lock_wait_s):
            record = self.records.find(request.rental_id)
            check_not_newer(record, request.epoch)
            if record is None:
                return {"changed": False, "state": "absent", "killed": 0}
            changed = self._keys.lock(record.username)
            killed = processes.kill_all({record.uid: record.username}) if request.kill else 0
            return {"changed": changed or killed > 0, "state": "locked", "killed": killed}

    def purge(self, requests: Sequence[RentalOrder]) -> list[Report | RequestRefused]:
        """Nothing of these rentals is left, and each report says so after looking. The epochs never come back here.

        They are different ones, and share what takes long: two searches of the whole file system.
        """
        found: dict[str, Report | RequestRefused] = {}
        with ExitStack() as locks:
            purged = []
            for request in sorted(requests, key=lambda each: each.rental_id):  # in the same order as anybody else
                try:
                    locks.enter_context(self.records.locked(request.rental_id, self._lock_wait_s))
                    before = self.records.find(request.rental_id)
                    check_not_newer(before, request.epoch)
                    self._check_names(request, before)
                except RequestRefused as refusal:
                    found[request.rental_id] = refusal
                else:
                    self.records.save(_ending(request))
                    purged.append(request)
                    found[request.rental_id] = {"changed": before is not None}
            for request, report in zip(purged, self._purger.purge(purged), strict=True):
                if not report["left"]:
                    self.records.bury(_ending(request))
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
                "state": self._state_of(record),
            }
            for record in self.records.all()
        ]

    def lock_at_once(self, record: RentalRecord) -> None:
        """Lock at once, whatever other command is at work on it: one rename, harmless between any two steps."""
        self._keys.lock(record.username)

    def discard_staging(self) -> None:
        """At the start of the container: what was set aside for a transfer is of no use any more."""
        remove_tree(self._paths.staging)

    def freeze_over_limit(self, record: RentalRecord, reason: str) -> bool:
        """Freeze it because its home holds too much; False while it may make room, having been thawed for that."""
        with self.records.locked(record.rental_id, self._lock_wait_s):
            now = self.records.find(record.rental_id)
            if now is None or now.epoch != record.epoch or self.freezer.is_in_grace(record, _boot_time_s()):
                return False
            self.lock_at_once(record)
            self.freezer.freeze(record, None, over_limit=reason)
            return True

    def retire(self, record: RentalRecord) -> None:
        """Nothing of it runs, nobody is let in, and nothing that reads its files is stopped. With the rental's lock.

        It is written down first, so that neither an order nor the fence freezes it again, nor lets it go on.
        """
        self.records.save(replace(record, retired=True))
        self.lock_at_once(record)
        processes.kill_all({record.uid: record.username})
        with self.freezer.locked(FREEZING_WAIT_S):
            self.freezer.forget(record.rental_id)

    def _current_record(self, request: RentalOrder) -> RentalRecord:
        """Return the record of a rental that may go on here at exactly this epoch. With the rental's lock."""
        record = self.records.find(request.rental_id)
        check_unlock(record, self.records.purged_epoch(request.rental_id), request.epoch)
        check_not_retired(record)
        assert record is not None  # noqa: S101 - check_unlock has refused it
        return record

    def _check_names(self, request: RentalOrder, record: RentalRecord | None) -> None:
        """A rental keeps its name and number for ever; nothing is done to another's by a mistaken order."""
        same = (request.username, request.uid)
        if record and (record.username, record.uid) != same:
            raise RequestRefused("conflict", f"this rental is {record.username}, uid {record.uid}, here")
        others = (each for each in self.records.all() if each.rental_id != request.rental_id)
        if any(request.username == each.username or request.uid == each.uid for each in others):
            raise RequestRefused("conflict", f"{request.username} or uid {request.uid} is another rental's here")
        if accounts.taken_by_another(self._paths.etc, *same):
            raise RequestRefused("conflict", f"{request.username} or uid {request.uid} is another account's here")

    def _make_home(self, request: RentalOrder) -> bool:
        """Empty, so that a copy of the rental's files can be put into it."""
        home = self._paths.homes / request.username
        with suppress(FileExistsError):
            home.mkdir(mode=0o700)
        folder = os.open(home, trees.OPEN_FOLDER)
        try:
            if os.fstat(folder).st_uid == request.uid:
                return False
            os.fchmod(folder, 0o700)
            os.fchown(folder, request.uid, request.uid)
        finally:
            os.close(folder)
        return True

    def _write_keys(self, request: RentalOrder, name: str) -> bool:
        """Each key counts only from the app's address: people come in through the manager's relay."""
        source = self._paths.app_address.read_text().strip()
        variables = rental_variables(request.rental_id, name).items()
        limits = ",".join([f'from="{source}"', *(f'environment="{variable}={value}"' for variable, value in variables)])
        text = "".join(f"{limits} {key}\n" for key in request.public_keys)
        if request.user_authority:
            # In the same file, so that what shuts out the keys shuts out certificates in the same step.
            principal = f"{request.rental_id}-{request.epoch}"
            text += f'cert-authority,principals="{principal}",{limits} {request.user_authority}\n'
        return self._keys.write(request.username, text, request.uid)

    def _install(self, request: RentalOrder) -> bool:
        return bool(request.host_certificate) and self._certificate.install(request.host_certificate, time.time())

    def _activate(self, record: RentalRecord) -> bool:
        """Unless the lease ends meanwhile: whichever of the two looks last finds what the other did.

        It looks first as well: the fence freezes whoever was let in, and only a reply to a running rental thaws.
        """
        self._check_lease()
        if not self._keys.exist(record.username):
            raise RequestRefused("unknown_rental", "its keys are not here: it was not created at this epoch")
        if not record.activated:
            self.records.save(replace(record, activated=True))  # before the keys: see files.py
        changed = self._keys.activate(record.username)
        try:
            self._check_lease()
        except RequestRefused:
            self.lock_at_once(record)
            raise
        return changed

    def _check_lease(self) -> None:
        if not self.freezer.has_lease:
            raise RequestRefused("no_lease", "this worker has no lease: nobody is let in")

    def _start(self, request: RentalOrder) -> Report:
        """Under a lease, as whoever is let in: what starts as that ends is stopped by the fence's next look."""
        with self.records.locked(request.rental_id, self._lock_wait_s):
            record = self._current_record(request)
            self._check_lease()
            if self.freezer.is_frozen(record.rental_id):
                raise RequestRefused("no_lease", "it was frozen meanwhile: nothing of it may run")
            return self.launcher.launch(record, request.start, request.start_mark)

    def _state_of(self, of: RentalRecord | RentalOrder) -> str:
        return (
            "frozen"
            if self.freezer.is_frozen(of.rental_id)
            else ("running" if self._keys.are_active(of.username) else "locked")
        )


def _ending(request: RentalOrder) -> RentalRecord:
    return RentalRecord(request.rental_id, request.username, request.uid, request.epoch, ending=True)


def _boot_time_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
