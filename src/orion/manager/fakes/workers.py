"""Workers in memory, with fakes of the ports `Engine`, `Reach` and `Liveness`.

Their contract is tests/ansible_contract.py, which includes the worker's checks of epochs and tombstones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from orion.manager.ansible.port import OF_ONE_BOOT, OTHER_BOOT, Action, Job, Outcome
from orion.manager.ssh.port import End, Host, Reached, Sign


@dataclass(frozen=True, kw_only=True)
class Account:
    """The account of a rental on a worker."""

    username: str
    uid: int
    epoch: int
    keys: tuple[str, ...]
    unlocked: bool


class RefusedOrder(Exception):
    """The worker's program refused the order."""


@dataclass(eq=False, kw_only=True)
class FakeWorker:
    """One worker. Tests read and change its fields."""

    host: Host
    accounts: dict[str, Account] = field(default_factory=dict)
    tombstones: dict[str, int] = field(default_factory=dict)
    homes: dict[str, dict[str, str]] = field(default_factory=dict)
    """The files of each rental's home, by name."""
    frozen: dict[str, int] = field(default_factory=dict)
    """The frozen rentals, with the number of the planned migration for which they are frozen."""
    activated: dict[str, int] = field(default_factory=dict)
    """The epoch at which each rental's renter was activated."""
    started: dict[str, list[str]] = field(default_factory=dict)
    """The marks of the start commands that have run here, by rental."""
    over: set[str] = field(default_factory=set)
    """The rentals that are frozen because their homes hold too much."""
    exempt: set[str] = field(default_factory=set)
    """The rentals that were thawed though their homes hold too much, so that their owners can remove files."""
    restored: dict[str, str] = field(default_factory=dict)
    """The snapshot that each home was filled with."""
    set_aside: set[str] = field(default_factory=set)
    """The rentals that were set aside to be recovered (`laid_down` in a worker's refusals)."""
    names: dict[str, str] = field(default_factory=dict)
    """The name that each rental's sessions show."""
    start_problem: str = ""
    """The reason why no start command can run here; empty if it can."""
    alive: bool = True
    failure: str = ""
    """The message with which every job fails here; empty if jobs work."""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a job has reached this worker, even if it fails."""
    boot_id: str = "boot-0001"
    host_certificate: str = ""
    """The host certificate that its sshd shows."""
    sshd_restarts: int = 0
    """The number of restarts of sshd, one for each new host certificate."""
    _running: asyncio.Event = field(default_factory=asyncio.Event)
    _connections_closed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._running.set()

    def die(self) -> None:
        """Behave as a killed container: jobs that hang here fail at once."""
        self.alive = False
        self._running.set()
        self.close_connections()

    def close_connections(self) -> None:
        """Behave as a restart of sshd: liveness connections end, and new ones are accepted."""
        self._connections_closed.set()
        self._connections_closed = asyncio.Event()

    async def closed(self) -> None:
        await self._connections_closed.wait()

    def come_back(self) -> None:
        """Start the container again with its files, and with every account locked."""
        self.alive = True
        self.frozen.clear()
        self.accounts = {rental_id: replace(one, unlocked=False) for rental_id, one in self.accounts.items()}

    def hang(self) -> None:
        """Behave as a paused container: jobs wait until `resume` is called, or until their deadline."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    async def wait_until_running(self) -> None:
        self.asked.set()
        await self._running.wait()

    def create(self, job: Job) -> dict[str, Any]:
        order, rental_id = job.order, job.order.rental_id
        before = self.accounts.get(rental_id)
        purged = self.tombstones.get(rental_id, 0)
        if order.epoch <= purged:
            raise RefusedOrder(f"epoch {order.epoch} was purged here (tombstone of epoch {purged})")
        self._refuse_older(before, job)
        self._refuse_name_in_use(job)
        if job.action is Action.CREATE and rental_id in self.frozen:
            raise RefusedOrder("it is frozen: thaw it")
        same = before if before and before.epoch == order.epoch else None
        unlocked = job.action is Action.CREATE or bool(same and same.unlocked)
        account = Account(
            username=order.username, uid=order.uid, epoch=order.epoch, keys=order.public_keys, unlocked=unlocked
        )
        self.accounts[rental_id] = account
        self.set_aside.discard(rental_id)
        self.names[rental_id] = order.rental_name
        self._show(order.host_certificate)
        self.homes.setdefault(rental_id, {})
        if unlocked:
            self.activated[rental_id] = order.epoch
        report = {"changed": account != before, "epoch": order.epoch, "state": "running" if unlocked else "locked"}
        if same and rental_id in self.restored:
            report["restored"] = self.restored[rental_id]
        return report | (self._start(job) if unlocked and order.start else {})

    def _start(self, job: Job) -> dict[str, Any]:
        runs = self.started.setdefault(job.order.rental_id, [])
        if job.order.start_mark in runs:
            return {}
        if self.start_problem:
            return {"started": False, "start_problem": self.start_problem}
        runs.append(job.order.start_mark)
        return {"started": True}

    def freeze(self, job: Job) -> dict[str, Any]:
        account, rental_id = self._here(job), job.order.rental_id
        self.frozen[rental_id] = max(job.order.move, self.frozen.get(rental_id, 0))
        self.accounts[rental_id] = replace(account, unlocked=False)
        return {"changed": account.unlocked, "epoch": job.order.epoch, "state": "frozen", "killed": 0}

    def thaw(self, job: Job) -> dict[str, Any]:
        account, rental_id = self._here(job), job.order.rental_id
        if job.order.move < self.frozen.get(rental_id, 0):
            raise RefusedOrder(f"it stands still for planned move {self.frozen[rental_id]}, which is a later one")
        self.frozen.pop(rental_id, None)
        over = rental_id in self.over
        if over and job.order.move:
            raise RefusedOrder("its home holds more than it may: its owner alone may have it go on")
        self.over.discard(rental_id)
        self.exempt |= {rental_id} if over else set()
        self.accounts[rental_id] = replace(account, unlocked=True)
        return {"changed": over or not account.unlocked, "epoch": job.order.epoch, "state": "running"}

    def _here(self, job: Job) -> Account:
        account = self.accounts.get(job.order.rental_id)
        if account is None or account.epoch != job.order.epoch:
            raise RefusedOrder(f"epoch {job.order.epoch} is not here")
        if job.order.rental_id in self.set_aside:
            raise RefusedOrder("it is laid down to be recovered")
        return account

    def certify(self, job: Job) -> dict[str, Any]:
        account, epoch = self.accounts.get(job.order.rental_id), job.order.epoch
        if account is None:
            raise RefusedOrder("no such rental on this worker")
        if account.epoch != epoch:
            raise RefusedOrder(f"epoch {epoch} is not epoch {account.epoch}, which is here")
        changed = self._show(job.order.host_certificate)
        return {"changed": changed, "epoch": epoch, "state": "running" if account.unlocked else "locked"}

    def _show(self, certificate: str) -> bool:
        if certificate in {"", self.host_certificate}:
            return False
        self.host_certificate = certificate
        self.sshd_restarts += 1
        return True

    def purge(self, job: Job) -> dict[str, Any]:
        rental_id = job.order.rental_id
        self._refuse_older(self.accounts.get(rental_id), job)
        self._refuse_name_in_use(job)
        before = self.accounts.pop(rental_id, None)
        for kept in (self.homes, self.activated, self.started, self.restored, self.frozen):
            kept.pop(rental_id, None)
        self.set_aside.discard(rental_id)
        self.tombstones[rental_id] = max(job.order.epoch, self.tombstones.get(rental_id, 0))
        return {"changed": before is not None, "left": [], "removed_files": 0, "killed": 0, "looked": ["/"]}

    def _refuse_older(self, account: Account | None, job: Job) -> None:
        if account and job.order.epoch < account.epoch:
            raise RefusedOrder(f"epoch {job.order.epoch} is older than epoch {account.epoch}, which was seen here")

    def _refuse_name_in_use(self, job: Job) -> None:
        for rental_id, account in self.accounts.items():
            same = (account.username == job.order.username, account.uid == job.order.uid)
            if (rental_id == job.order.rental_id and not all(same)) or (rental_id != job.order.rental_id and any(same)):
                raise RefusedOrder(f"{job.order.username} or uid {job.order.uid} is another rental's here")


@dataclass
class FakeWorld:
    """The workers by address and port. A new worker may get a dead one's address."""

    workers: dict[tuple[str, int], FakeWorker] = field(default_factory=dict)

    def add(self, host: Host) -> FakeWorker:
        worker = self.workers[host.address, host.port] = FakeWorker(host=host)
        return worker

    def at(self, host: Host) -> FakeWorker | None:
        worker = self.workers.get((host.address, host.port))
        return worker if worker and worker.alive else None

    def recognises(self, worker: FakeWorker, host: Host) -> bool:
        return bool(set(worker.host.host_keys) & set(host.host_keys))

    async def reach(self, host: Host, timeout_s: float) -> FakeWorker | None:
        """Return the worker when it runs; None if it is dead. Raise TimeoutError if it hangs for `timeout_s`."""
        worker = self.at(host)
        if worker is not None:
            async with asyncio.timeout(timeout_s):
                await worker.wait_until_running()
        return worker if worker and worker.alive else None


@dataclass
class FakeEngine:
    """Implements `port.Engine`."""

    world: FakeWorld

    async def run(self, job: Job) -> Outcome:
        await asyncio.sleep(0)  # a real job never returns at once
        try:
            worker = await self.world.reach(job.host, job.deadline_s)
        except TimeoutError:
            return Outcome(ok=False, message=f"timed out after {job.deadline_s:g} s")
        if worker is None:
            return _unreachable("nothing answers at its address")
        if not self.world.recognises(worker, job.host):
            return _unreachable("it has another host key than the pinned one")
        if worker.failure:
            return Outcome(ok=False, message=worker.failure)
        if job.action in OF_ONE_BOOT and job.host.boot_id not in {"", worker.boot_id}:
            report = {"changed": False, "code": OTHER_BOOT}
            return Outcome(ok=False, message="it is for another life of this worker's container", report=report)
        order = {Action.DELETE: worker.purge, Action.FREEZE: worker.freeze, Action.THAW: worker.thaw}
        order[Action.CERTIFY] = worker.certify
        try:
            return Outcome(ok=True, report=order.get(job.action, worker.create)(job))
        except RefusedOrder as refusal:
            return Outcome(ok=False, message=str(refusal), report={"changed": False})


def _unreachable(reason: str) -> Outcome:
    return Outcome(ok=False, message=f"the worker cannot be reached by SSH: {reason}")


@dataclass
class FakeReach:
    """Implements `port.Reach`."""

    world: FakeWorld

    async def reach(self, host: Host, timeout_s: float) -> Reached:
        await asyncio.sleep(0)
        try:
            worker = await self.world.reach(host, timeout_s)
        except TimeoutError:
            return Reached.NO
        if worker is None:
            return Reached.NO
        return Reached.YES if self.world.recognises(worker, host) else Reached.IMPOSTOR


@dataclass
class FakeLiveness:
    """Implements `port.Liveness`, without waiting for silence."""

    world: FakeWorld

    async def hold(self, host: Host, boot_id: str, on_sign: Callable[[Sign], None]) -> End:
        await asyncio.sleep(0)
        worker = self.world.at(host)
        while worker is not None and self.world.recognises(worker, host):
            if worker.boot_id != boot_id:
                return End.NOT_HELD
            on_sign(Sign.HELD)
            await worker.closed()
            on_sign(Sign.CLOSED)
            await asyncio.sleep(0)
            worker = self.world.at(host)
            if worker is None:
                return End.GONE
            if not self.world.recognises(worker, host):
                return End.REPLACED
        return End.NOT_HELD
