"""The commands of `orion-rental` (rental/cli.py), which the agent calls too.

They make, lock, freeze, thaw, unlock and purge a rental on its worker, and keep its epoch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from orion.rental_order import RentalOrder
from orion_worker.freezer.marks import Freezer
from orion_worker.records import (
    RentalRecord,
    RentalRecords,
    Report,
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
from orion_worker.snapshots.manifests import Manifests
from orion_worker.start.launcher import Launcher, rental_variables
from orion_worker.system import processes, trees
from orion_worker.system.files import closing

LOCK_WAIT_S = 20.0
FREEZING_WAIT_S = 5.0


class Rentals:
    """The commands. Each may be killed at any instant, and may be repeated."""

    def __init__(self, paths: WorkerPaths | None = None, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self._paths = paths or WorkerPaths()
        self._lock_wait_s = lock_wait_s
        self.records = RentalRecords(self._paths.root / "var/lib/orion/rentals")
        self.freezer = Freezer(self._paths.root)
        self.launcher = Launcher(self._paths.root)
        self.manifests = Manifests(self._paths.root)
        self._keys = KeyFiles(self._paths)
        self._purger = Purger(
            paths=self._paths, keys=self._keys, freezer=self.freezer, launcher=self.launcher, manifests=self.manifests
        )
        self._certificate = HostCertificate(self._paths.root)

    def create(self, request: RentalOrder) -> Report:
        """Make the account, the home and the keys, locked unless this very epoch was unlocked before."""
        with self._locked(request.rental_id) as record:
            check_create(record, self.records.purged_epoch(request.rental_id), request.epoch)
            self._check_names(request, record)
            changed, restored = True, dict[str, str]()
            name = request.rental_name or (record.rental_name if record else "")
            if record is None or record.epoch < request.epoch:
                self._keys.forget(request.username)
                self.records.save(replace(_record_of(request), rental_name=name))
            else:
                restored = {"restored": record.restored}
                # A manager that went back to a backup may run a retired rental on here: it is not lost any more.
                changed = record.rental_name != name or record.retired
                if changed:
                    self.records.save(replace(record, rental_name=name, retired=False))
            changed |= accounts.add(self._paths.etc, request.username, request.uid)
            changed |= self._make_home(request)
            changed |= self._write_keys(request, name)
            changed |= self._install(request)
            return {"changed": changed, "epoch": request.epoch, "state": self._state_of(request), **restored}

    def certify(self, request: RentalOrder) -> Report:
        """Have sshd show this certificate, or one that was signed later."""
        with self._locked(request.rental_id) as found:
            record = check_unlock(found, self.records.purged_epoch(request.rental_id), request.epoch)
            changed = self._install(request)
        self._certificate.show()
        return {"changed": changed, "epoch": request.epoch, "state": self._state_of(record)}

    def unlock(self, request: RentalOrder) -> Report:
        """Activate the rental: move its keys to where sshd looks."""
        with self._locked_current(request) as record:
            if self.freezer.is_frozen(record.rental_id):
                raise RequestRefused("frozen", "it is frozen: thaw it")
            return {"changed": self._activate(record), "epoch": record.epoch, "state": "running"}

    def freeze(self, request: RentalOrder) -> Report:
        """Lock the rental and stop all that runs of it, until it is thawed. Its processes and files are kept."""
        with self._locked(request.rental_id) as record:
            check_not_newer(record, request.epoch)
            check_not_retired(record)
            if record is None:
                return {"changed": False, "state": "absent", "killed": 0}
            self.lock_at_once(record)
            changed, killed = self.freezer.freeze(record, _boot_time_s(), migration=request.move)
            return {"changed": changed, "epoch": record.epoch, "state": "frozen", "killed": killed}

    def thaw(self, request: RentalOrder, requested_at: float | None = None) -> Report:
        """Let the rental run on, and activate it. `requested_at`: when the call was sent whose reply asks for it."""
        with self._locked_current(request) as record:
            changed = self.freezer.thaw(record, requested_at, request.move)
            return {"changed": self._activate(record) or changed, "epoch": record.epoch, "state": "running"}

    def run(self, request: RentalOrder) -> Report:
        """Create the rental, unlock it, then run its start command. Each step looks at the epoch anew.

        `create` and `unlock` are also commands of their own, for a restore of files between the two. The rental
        is not activated before sshd can show the worker's certificate for it.
        """
        created = self.create(request)
        if request.host_certificate:
            self._certificate.show()
        unlocked = self.unlock(request)
        started = self._start(request) if request.start else {}
        changed = created["changed"] or unlocked["changed"] or bool(started)
        return {**unlocked, **started, "changed": changed}

    def lock(self, request: RentalOrder) -> Report:
        """Move the keys to where sshd does not look; with `kill`, end the rental's processes."""
        with self._locked(request.rental_id) as record:
            check_not_newer(record, request.epoch)
            if record is None:
                return {"changed": False, "state": "absent", "killed": 0}
            changed = self._keys.lock(record.username)
            killed = processes.kill_all({record.uid: record.username}) if request.kill else 0
            return {"changed": changed or killed > 0, "state": "locked", "killed": killed}

    def purge(self, requests: Sequence[RentalOrder]) -> list[Report | RequestRefused]:
        """Remove these different rentals; each report says what is left. Their epochs are never made here again.

        They share what takes long: two searches of the whole file system.
        """
        found: dict[str, Report | RequestRefused] = {}
        existed: dict[RentalOrder, bool] = {}
        with ExitStack() as locks:
            for request in sorted(requests, key=lambda each: each.rental_id):  # one order of locks, against deadlocks
                try:
                    before = locks.enter_context(self._locked(request.rental_id))
                    check_not_newer(before, request.epoch)
                    self._check_names(request, before)
                except RequestRefused as refusal:
                    found[request.rental_id] = refusal
                else:
                    self.records.save(replace(_record_of(request), ending=True))
                    existed[request] = before is not None
            for request, report in zip(existed, self._purger.purge([*existed]), strict=True):
                if not report["left"]:
                    self.records.bury(_record_of(request))
                changed = existed[request] or report["killed"] + report["removed_files"] > 0
                found[request.rental_id] = {**report, "changed": changed}
        return [found[request.rental_id] for request in requests]

    def inventory(self) -> list[dict[str, Any]]:
        """Return the rentals that have something here, in the form of a heartbeat."""
        names = ("rental_id", "username", "uid", "epoch")
        return [
            {name: getattr(record, name) for name in names} | {"state": self._state_of(record)}
            for record in self.records.all()
        ]

    def lock_at_once(self, record: RentalRecord) -> None:
        """Lock a rental without waiting for its lock: one rename is harmless between any two steps of a command."""
        self._keys.lock(record.username)

    def discard_staging(self) -> None:
        """Remove what was staged for transfers, which is of no use after a start of the container."""
        trees.remove_tree(self._paths.staging)

    def freeze_over_limit(self, record: RentalRecord, reason: str) -> bool:
        """Freeze a rental whose home holds too much; return False while its renter has time to make room."""
        with self._locked(record.rental_id) as now:
            if now is None or now.epoch != record.epoch or self.freezer.is_in_grace(record, _boot_time_s()):
                return False
            self.lock_at_once(record)
            self.freezer.freeze(record, None, over_limit=reason)
            return True

    def retire(self, record: RentalRecord) -> None:
        """Lock a rental and end its processes, so that its files can be recovered. The caller holds the rental's lock.

        The record is written first, so that neither an order nor the fence freezes the rental again or lets it run on.
        """
        self.records.save(replace(record, retired=True))
        self.lock_at_once(record)
        processes.kill_all({record.uid: record.username})
        with self.freezer.locked(FREEZING_WAIT_S):
            self.freezer.forget(record.rental_id)

    @contextmanager
    def _locked(self, rental_id: str) -> Iterator[RentalRecord | None]:
        """Hold the lock of a rental, and give its record."""
        with self.records.locked(rental_id, self._lock_wait_s):
            yield self.records.find(rental_id)

    @contextmanager
    def _locked_current(self, request: RentalOrder) -> Iterator[RentalRecord]:
        """Hold the lock of a rental, and give its record; raise RequestRefused unless it may run at this epoch."""
        with self._locked(request.rental_id) as found:
            record = check_unlock(found, self.records.purged_epoch(request.rental_id), request.epoch)
            check_not_retired(record)
            yield record

    def _check_names(self, request: RentalOrder, record: RentalRecord | None) -> None:
        """Raise RequestRefused if name or uid differ from the rental's, which never change, or are another rental's."""
        same = (request.username, request.uid)
        if record and (record.username, record.uid) != same:
            raise RequestRefused("conflict", f"this rental is {record.username}, uid {record.uid}, here")
        others = (each for each in self.records.all() if each.rental_id != request.rental_id)
        if any(request.username == each.username or request.uid == each.uid for each in others):
            raise RequestRefused("conflict", f"{request.username} or uid {request.uid} is another rental's here")
        if accounts.taken_by_another(self._paths.etc, *same):
            raise RequestRefused("conflict", f"{request.username} or uid {request.uid} is another account's here")

    def _make_home(self, request: RentalOrder) -> bool:
        """Make an empty home, which a snapshot can be put into; return False if the renter has one."""
        home = self._paths.homes / request.username
        with suppress(FileExistsError):
            home.mkdir(mode=0o700)
        with closing(os.open(home, trees.OPEN_FOLDER)) as folder:
            if os.fstat(folder).st_uid == request.uid:
                return False
            os.fchmod(folder, 0o700)
            os.fchown(folder, request.uid, request.uid)
        return True

    def _write_keys(self, request: RentalOrder, name: str) -> bool:
        """Write the keys. Each counts only from the manager's address, because renters come through its relay."""
        source = self._paths.app_address.read_text().strip()
        variables = rental_variables(request.rental_id, name).items()
        limits = ",".join([f'from="{source}"', *(f'environment="{variable}={value}"' for variable, value in variables)])
        text = "".join(f"{limits} {key}\n" for key in request.public_keys)
        if request.user_authority:
            # The authority is in the same file, so that one rename locks out keys and certificates together.
            principal = f"{request.rental_id}-{request.epoch}"
            text += f'cert-authority,principals="{principal}",{limits} {request.user_authority}\n'
        return self._keys.write(request.username, text, request.uid)

    def _install(self, request: RentalOrder) -> bool:
        return bool(request.host_certificate) and self._certificate.install(request.host_certificate, time.time())

    def _activate(self, record: RentalRecord) -> bool:
        """Activate a rental, unless the lease ends meanwhile: the fence or this, whichever looks last, sees the other.

        The lease is checked before as well, because the fence freezes an activated rental, and only a reply thaws it.
        """
        self._check_lease()
        if not self._keys.exist(record.username):
            raise RequestRefused("unknown_rental", "its keys are not here: it was not created at this epoch")
        if not record.activated:
            # The record comes before the keys: a home that a renter could change is never overwritten (check_receive).
            self.records.save(replace(record, activated=True))
        changed = self._keys.activate(record.username)
        try:
            self._check_lease()
        except RequestRefused:
            self.lock_at_once(record)
            raise
        return changed

    def _check_lease(self) -> None:
        if not self.freezer.has_lease:
            raise RequestRefused("no_lease", "this worker has no lease: no rental is activated")

    def _start(self, request: RentalOrder) -> Report:
        """Run the start command under a lease. If the lease ends meanwhile, the fence's next look stops the command."""
        with self._locked_current(request) as record:
            self._check_lease()
            if self.freezer.is_frozen(record.rental_id):
                raise RequestRefused("no_lease", "it was frozen meanwhile: nothing of it may run")
            return self.launcher.launch(record, request.start, request.start_mark)

    def _state_of(self, of: RentalRecord | RentalOrder) -> str:
        if self.freezer.is_frozen(of.rental_id):
            return "frozen"
        return "running" if self._keys.are_active(of.username) else "locked"


def _record_of(request: RentalOrder) -> RentalRecord:
    return RentalRecord(rental_id=request.rental_id, username=request.username, uid=request.uid, epoch=request.epoch)


def _boot_time_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
