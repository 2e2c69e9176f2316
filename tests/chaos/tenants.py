"""Renters during a round, each in a thread: they keep a witness running in their rental, and record the API's answers.

A tenant keeps its rental; a guest rents, works for a while, releases, and rents again. Like any client, they repeat a
request that fails or gets no answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from renter import Renter
from stack import Stack

from chaos.history import GrantedRental, Shown
from chaos.witness import COMPLAINTS, LINES
from orion.client.sdk import Orion
from orion.errors import Conflict, NotFound, OrionError, Retryable, ServerFault
from orion.wire import Rental, RentalState

LOOKS_EVERY_S = 0.3
BACK_AFTER_S = 1.0
"""Seconds until a broken session is opened again."""
GUEST_STAYS_S = 6.0
PLACE = "/ticks"
JOURNAL = f"{PLACE}/ticks"
FOUND = f"{PLACE}/found"
WITNESS, BANK, TREE, POSTGRES = (f"{PLACE}/{name}.py" for name in ("witness", "bank", "difficult_tree", "postgres"))
MAKE_TREE = (
    "[ -e tree ] || { chmod -R u+rwx tree.new; rm -rf tree.new; "
    f"python3 {TREE} make tree.new && python3 {TREE} describe tree.new > listing && mv tree.new tree; }}"
)
"""A command that makes the tree after its listing, so that every snapshot with a tree has its listing."""
CHECK_TREE = f"[ ! -e tree ] || python3 {TREE} describe tree | diff listing - | head -n 40"
NOT_NOW = (Retryable, ServerFault, Conflict)


class TenantRecords:
    """The records of all tenants. `of_boot`: converts wall clock seconds to seconds of CLOCK_BOOTTIME."""

    def __init__(self, now: Callable[[], float], of_boot: Callable[[float], float]) -> None:
        self.now = now
        self._of_boot = of_boot
        self.asked: dict[str, GrantedRental] = {}
        self.shown: list[Shown] = []

    def note(self, rental: Rental) -> None:
        safe_at = rental.last_safe_copy_at
        self.shown.append(
            Shown(self.now(), rental.id, rental.epoch, self._of_boot(safe_at.timestamp()) if safe_at else None)
        )


class Session:
    """A login that starts the witness, unless it runs already, and lasts as long as the witness.

    It also starts a bank in SQLite, creates a tree of difficult files, and optionally starts a bank in PostgreSQL. Its
    ssh may wait until the rental runs again with a later epoch on the same host: if an account was created after
    `read_at` (Unix time, before the epoch was read), it starts nothing.
    """

    def __init__(self, renter: Renter, rental: Rental, host: str, postgres: bool, read_at: float) -> None:
        self.of = (rental.epoch, rental.worker_id)
        words = f"'{rental.id} {host} {rental.epoch}'"
        background = [f"python3 {BANK} start bank {FOUND} {words}", f"flock -n tree.lock sh -c '{MAKE_TREE}'"]
        background += [f"python3 {POSTGRES} start postgres {FOUND} {words}"] if postgres else []
        command = (
            f'[ -z "$(find /etc/passwd -newermt @{read_at:.3f})" ] || exit 0; '
            f"( {'; '.join(background)} ) >/dev/null 2>&1 </dev/null & "
            f"exec python3 {WITNESS} {rental.id} {rental.epoch} {host} {JOURNAL}"
        )
        self._ssh = subprocess.Popen(
            renter.arguments(rental, command),
            env=renter.environment,
            cwd=renter.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        return self._ssh.poll() is not None

    def close(self) -> None:
        """End the login and its ProxyCommand. The processes in the rental keep running."""
        if not self.ended:
            os.killpg(self._ssh.pid, signal.SIGKILL)
        self._ssh.wait()


class Tenant(threading.Thread):
    def __init__(self, stack: Stack, renter: Renter, catalog: TenantRecords, name: str, postgres: bool = False) -> None:
        super().__init__(name=name, daemon=True)
        self._postgres = postgres
        self._stack = stack
        self._renter = renter
        self._book = catalog
        self._leaving = threading.Event()
        self._session: Session | None = None
        self._again_at = 0.0
        self.faults: list[str] = []
        """The answers that a renter must never get."""

    def leave(self) -> None:
        self._leaving.set()

    def run(self) -> None:
        try:
            with self._stack.connect() as orion:
                self._live(orion)
        except Exception as error:
            self.faults.append(f"{self.name}: {error!r}")
        finally:
            if self._session:
                self._session.close()

    def _live(self, orion: Orion) -> None:
        rental_id = self._rent(orion, self.name)
        while rental_id and not self._leaving.wait(LOOKS_EVERY_S):
            self._look_after(orion, rental_id)

    def _rent(self, orion: Orion, name: str) -> str | None:
        """Repeat the same request until it is answered, and return the rental's id, or None if the round ends."""
        while not self._leaving.is_set():
            try:
                key = self._renter.public_key
                rental = orion.rent(name=name, ssh_public_key=key, wait_s=2, idempotency_key=f"chaos-{name}")
            except NOT_NOW:
                self._leaving.wait(LOOKS_EVERY_S)
                continue
            self._book.asked[rental.id] = GrantedRental(rental.id, name, released=False)
            return rental.id
        return None

    def _look_after(self, orion: Orion, rental_id: str) -> None:
        read_at = time.time()
        try:
            rental = orion.rental(rental_id)
        except NOT_NOW:
            return
        except NotFound as error:
            self.faults.append(f"{self.name} ({rental_id}): {error}")
            return
        try:
            host = orion.worker(rental.worker_id).hostname if rental.worker_id else ""
        except (*NOT_NOW, NotFound):  # the worker may have been removed meanwhile
            return
        self._book.note(rental)
        if rental.state is RentalState.ACTIVE:
            self._keep_witness(rental, host, read_at)

    def _keep_witness(self, rental: Rental, host: str, read_at: float) -> None:
        session, now = self._session, time.monotonic()
        if session and (session.of != (rental.epoch, rental.worker_id) or session.ended):
            session.close()
            self._session = None
            self._again_at = now + (BACK_AFTER_S if session.of == (rental.epoch, rental.worker_id) else 0.0)
        if self._session is None and now >= self._again_at:
            self._session = Session(self._renter, rental, host, self._postgres, read_at)


class Guest(Tenant):
    def _live(self, orion: Orion) -> None:
        visit = 0
        while not self._leaving.is_set():
            visit += 1
            name = f"{self.name}-{visit}"
            rental_id = self._rent(orion, name)
            if rental_id is None:
                return
            until = time.monotonic() + GUEST_STAYS_S
            while time.monotonic() < until and not self._leaving.wait(LOOKS_EVERY_S):
                self._look_after(orion, rental_id)
            self._release(orion, rental_id, name)

    def _release(self, orion: Orion, rental_id: str, name: str) -> None:
        """Repeat the release until it is answered. The checker verifies that the rental ends."""
        while True:
            try:
                orion.release(rental_id, wait_s=0)
            except NOT_NOW:
                if self._leaving.wait(LOOKS_EVERY_S):
                    time.sleep(LOOKS_EVERY_S)
                continue
            except OrionError as error:
                self.faults.append(f"{name} ({rental_id}): {error}")
            self._book.asked[rental_id] = GrantedRental(rental_id, name, released=True)
            if self._session:
                self._session.close()
                self._session = None
            return


def read_lines(renter: Renter, rental: Rental) -> tuple[str, ...]:
    """Kill the programs in the rental, and return the lines in its home and the witness's errors."""
    ended = "pkill -KILL -x 'python3|postgres|pgbench'"
    return tuple(renter.inside(rental, f"{ended}; cat {LINES} {COMPLAINTS}").splitlines())


def read_faults(renter: Renter, rental: Rental) -> tuple[str, ...]:
    """Return the faults of the rental's banks and of its tree, after its programs have ended."""
    found: list[str] = []
    for folder, program in (("bank", BANK), ("postgres", POSTGRES)):
        needed = folder == "bank"  # PostgreSQL's may not exist yet
        look = f"python3 {program} check {folder} || true"
        output = renter.inside(rental, look if needed else f"[ ! -e {folder} ] || {look}")
        found += json.loads(output or "[]")
    return (*found, *renter.inside(rental, CHECK_TREE).splitlines())
