"""Host certificates: each worker has one that names the rentals which are placed there, and shows it to their renters.

A rental's own order brings the certificate that names it, so it is recognised from its first moment on. Later ones are
asked for by whoever lets somebody in: where nobody comes, nothing has to be renewed, and a worker that is not the
rental's any more is never asked. What is known here of what workers show is lost with the manager; the next to come in
has it signed anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from orion.manager.ansible.port import Action, Engine, Job, Outcome
from orion.manager.domain.host_certificates import FRESH_S, Issued, NothingToSign
from orion.manager.ssh.authority import Authority
from orion.manager.ssh.port import Host
from orion.manager.store import host_certificates
from orion.manager.store.database import Store

log = structlog.get_logger()

CERTIFY_WITHIN_S = 5.0
JUST_VALID_S = 60.0


class HostCertificates:
    def __init__(self, *, store: Store, authority: Authority, engine: Engine, wall: Callable[[], float]) -> None:
        self._store = store
        self._authority = authority
        self._engine = engine
        self._wall = wall
        self._shown: dict[str, Issued] = {}
        """By worker; of workers that are not there any more too, until their certificate has ended."""
        self._signed: dict[str, Issued] = {}
        """The last of each worker, whether it shows it by now or not; as above."""
        self._signing: dict[str, asyncio.Task[Issued | None]] = {}
        self._renewing: dict[tuple[str, str], asyncio.Task[None]] = {}
        """By worker and owner: a renewal is an order about one rental, whose renter may hold it up."""

    async def issue(self, host: Host) -> Issued | None:
        """Signed now, of what is placed there now; None where that is nothing.

        The serial first: so whatever was placed before a certificate was asked for is in every later one as well, and
        it does not matter in which order they reach the worker.
        """
        serial = self._authority.next_serial()
        rental_ids = await self._store.read(host_certificates.current_on, host.worker_id)
        try:
            issued = self._authority.host_certificate(serial, host.worker_id, host.host_keys, rental_ids)
        except NothingToSign as reason:
            log.warning("no host certificate", worker_id=host.worker_id, reason=str(reason))
            return None
        _keep_newest(self._signed, host.worker_id, issued, self._wall())
        return issued

    async def naming(self, job: Job) -> Issued | None:
        """The last that was signed for its worker, if that names the rental and is good for a while; else a new one.

        So those that are placed on a worker together come with one and the same, and its sshd begins anew once, not for
        each of a hundred.
        """
        worker_id = job.host.worker_id
        if not self._is_named(job) and worker_id in self._signing:
            await asyncio.wait([self._signing[worker_id]])
        if self._is_named(job):
            return self._signed[worker_id]
        signing = self._signing[worker_id] = asyncio.create_task(self.issue(job.host))
        try:
            return await signing
        finally:
            if self._signing.get(worker_id) is signing:
                del self._signing[worker_id]

    def _is_named(self, job: Job) -> bool:
        last = self._signed.get(job.host.worker_id)
        return last is not None and last.serves(job.rental_id, job.host.host_keys, self._wall(), FRESH_S)

    def shows(self, worker_id: str, issued: Issued) -> None:
        """The worker has said so."""
        _keep_newest(self._shown, worker_id, issued, self._wall())

    async def ensure(self, job: Job) -> None:
        """Its worker can be recognised as this rental's, as far as that can be brought about now.

        `job`: of the rental, of whatever action. A renter's own ssh verifies what is shown: a failure opens nothing.
        """
        worker_id = job.host.worker_id
        shown = self._shown.get(worker_id)
        if shown and shown.serves(job.rental_id, job.host.host_keys, self._wall(), FRESH_S):
            return
        whose = worker_id, job.owner
        if whose not in self._renewing:
            self._renewing[whose] = asyncio.create_task(self._renew(job))
        if shown and shown.serves(job.rental_id, job.host.host_keys, self._wall(), JUST_VALID_S):
            return
        await asyncio.wait([self._renewing[whose]], timeout=CERTIFY_WITHIN_S)

    async def stop(self) -> None:
        running = list(self._renewing.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _renew(self, job: Job) -> None:
        try:
            issued = await self.issue(job.host)
            if issued is None or job.rental_id not in issued.rental_ids:
                return
            order = replace(
                job, action=Action.CERTIFY, host_certificate=issued.line, public_keys=(), deadline_s=CERTIFY_WITHIN_S
            )
            outcome = await self._engine.run(order)
            if outcome.ok:
                self.shows(job.host.worker_id, issued)
            else:
                log.warning("no host certificate", worker_id=job.host.worker_id, reason=outcome.message)
        except Exception:
            log.exception("no host certificate", worker_id=job.host.worker_id)
        finally:
            del self._renewing[job.host.worker_id, job.owner]


@dataclass
class CertifyingEngine:
    """Implements `port.Engine` by another one: whoever is let in finds a worker that can prove what it is."""

    engine: Engine
    certificates: HostCertificates
    user_authority: str

    async def run(self, job: Job) -> Outcome:
        if job.action not in {Action.CREATE, Action.PREPARE}:
            return await self.engine.run(job)
        job = replace(job, user_authority=self.user_authority)
        issued = await self.certificates.naming(job) if job.action is Action.CREATE else None
        if issued is None:
            return await self.engine.run(job)
        outcome = await self.engine.run(replace(job, host_certificate=issued.line))
        if outcome.ok:
            self.certificates.shows(job.host.worker_id, issued)
        return outcome


def _keep_newest(known: dict[str, Issued], worker_id: str, issued: Issued, now: float) -> None:
    """And forget those that have ended."""
    for ended in [w for w, one in known.items() if one.valid_until <= now]:
        del known[ended]
    before = known.get(worker_id)
    if before is None or before.serial < issued.serial:
        known[worker_id] = issued
