"""The purge of rentals: remove all that they have here, then search again for residue."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orion.rental_order import RentalOrder
from orion_worker.freezer.marks import Freezer
from orion_worker.records import Report, RequestRefused
from orion_worker.rental import accounts, residue
from orion_worker.rental.keys import KeyFiles
from orion_worker.rental.paths import WorkerPaths
from orion_worker.snapshots import transfer
from orion_worker.snapshots.manifests import Manifests
from orion_worker.start.launcher import Launcher
from orion_worker.system import processes, trees
from orion_worker.system.files import closing

SWEEPS = 3
"""The most searches for files of a uid. A search may miss an entry whose directory changes meanwhile; the first one
that finds nothing is the last."""


@dataclass(frozen=True, kw_only=True)
class Purger:
    """The removal of rentals from this worker."""

    paths: WorkerPaths
    keys: KeyFiles
    freezer: Freezer
    launcher: Launcher
    manifests: Manifests

    def purge(self, requests: Sequence[RentalOrder]) -> list[Report]:
        """Purge these rentals together; return for each what was removed and, under `left`, the residue."""
        if not requests:
            return []
        killed, removed = Counter[int](), Counter[int]()
        for request in requests:
            renter = {request.uid: request.username, transfer.sender_uid(request.uid): request.username}
            self.keys.forget(request.username)
            killed[request.uid] += processes.kill_all(renter)
            accounts.remove(self.paths.etc, request.username, request.uid)
            killed[request.uid] += processes.kill_all(renter)  # a log-in that was under way when the keys were removed
            self.freezer.forget_purged(request.rental_id)
            self.launcher.forget(request.rental_id)
            self.manifests.forget(request.rental_id)
            with suppress(RequestRefused):  # if a transfer does not end, the search for residue reports its files
                transfer.remove_staging(self.paths.staging, request.rental_id)
            removed[request.uid] += self._remove_named(request) + residue.remove_ipc(request.uid)
        removed.update(self._remove_owned({request.uid for request in requests}))
        return [
            {"removed_files": removed[each.uid], "killed": killed[each.uid], **report}
            for each, report in zip(requests, self._find_residue(requests), strict=True)
        ]

    def _remove_named(self, request: RentalOrder) -> int:
        removed = 0
        for place in residue.find_named(self.paths.root, request.username):
            with closing(os.open(place.parent, trees.OPEN_FOLDER)) as folder, suppress(OSError):
                removed += trees.remove_entry(folder, place.name)
        return removed

    def _remove_owned(self, uids: Collection[int]) -> Counter[int]:
        removed: Counter[int] = Counter()
        for mount in self._mounts():
            for _ in range(SWEEPS):
                found = [(each.uid, residue.remove(each)) for each in residue.find_owned(mount, uids, [])]
                for uid, number in found:
                    removed[uid] += number
                if not found:
                    break
        return removed

    def _find_residue(self, requests: Sequence[RentalOrder]) -> list[Report]:
        unsearched: list[str] = []
        owned: dict[int, list[str]] = {request.uid: [] for request in requests}
        mounts = self._mounts()
        for mount in mounts:
            for found in residue.find_owned(mount, owned.keys(), unsearched):
                owned[found.uid].append(f"file {found.path[:300]}")
        looked = ["processes", "accounts", "System V IPC", "keys, mail, cron, at", *mounts]
        return [
            {"left": (self._found(each) + owned[each.uid])[:50], "looked": looked, "unsearched": unsearched[:50]}
            for each in requests
        ]

    def _found(self, request: RentalOrder) -> list[str]:
        left = [f"process {pid} ({processes.name_of(pid)})" for pid in processes.pids_of([request.uid])]
        left += [f"log-in {pid}" for pid in processes.log_ins([request.username])]
        left += [f"line in {file}" for file in accounts.found(self.paths.etc, request.username, request.uid)]
        named = [*residue.find_named(self.paths.root, request.username), self.paths.staging / request.rental_id]
        left += [f"file {place}" for place in named if os.path.lexists(place)]
        return left + [f"IPC {kind} {number}" for kind, number in residue.find_ipc(request.uid)]

    def _mounts(self) -> list[str]:
        if self.paths.root != Path("/"):
            return [str(self.paths.root)]
        return residue.writable_mounts(Path("/proc/self/mountinfo").read_text())
