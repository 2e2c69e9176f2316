"""Host certificates: each worker has one that names the rentals placed there, and shows it to ssh clients.

The order that makes a rental brings the certificate that names it, so ssh recognises the worker from the first log-in
on. A log-in renews a certificate that ends soon, or that the manager has not sent since its start. Without log-ins
nothing is renewed: a renewal of all would sign for idle rentals for ever. The database keeps nothing of them.
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


@dataclass(kw_only=True, eq=False)
class HostCertificates:
    store: Store
    authority: Authority
    engine: Engine
    wall: Callable[[], float]

    def __post_init__(self) -> None:
        self._shown: dict[str, Issued] = {}
        """The certificate that each worker shows. Those of removed workers stay until they have ended."""
        self._signed: dict[str, Issued] = {}
        """The certificate that was signed last for each worker, whether the worker shows it yet or not."""
        self._signing: dict[str, asyncio.Task[Issued | None]] = {}
        self._renewing: dict[tuple[str, str], asyncio.Task[None]] = {}
        """Renewals by worker and owner: a renewal is an order for one rental, and its renter may delay it."""

    async def issue(self, host: Host) -> Issued | None:
        """Sign a certificate for the rentals that are placed on this worker now; return None if there is none.

        The serial is taken before the rentals are read. So a rental that was placed before that is in this certificate
        and in all with a higher serial, and the order in which certificates reach the worker does not matter.
        """
        serial = self.authority.next_serial()
        rental_ids = await self.store.read(host_certificates.current_on, host.worker_id)
        try:
            issued = self.authority.host_certificate(serial, host.worker_id, host.host_keys, rental_ids)
        except NothingToSign as reason:
            log.warning("host certificate not signed", worker_id=host.worker_id, reason=str(reason))
            return None
        _keep_newest(self._signed, host.worker_id, issued, self.wall())
        return issued

    async def naming(self, job: Job) -> Issued | None:
        """Return the last certificate of the job's worker if it names the rental and lasts a while; else sign one.

        So rentals that are placed on a worker together share one certificate, and its sshd restarts only once.
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
        return last is not None and last.serves(job.order.rental_id, job.host.host_keys, self.wall(), FRESH_S)

    def shows(self, worker_id: str, issued: Issued) -> None:
        _keep_newest(self._shown, worker_id, issued, self.wall())

    async def ensure(self, job: Job) -> None:
        """Renew the certificate of the job's worker if it does not name the rental or ends soon.

        `job`: any job of the rental. A failure raises nothing: the renter's own ssh verifies the worker and refuses it.
        """
        worker_id = job.host.worker_id
        shown = self._shown.get(worker_id)
        if shown and shown.serves(job.order.rental_id, job.host.host_keys, self.wall(), FRESH_S):
            return
        renewal = worker_id, job.owner
        if renewal not in self._renewing:
            self._renewing[renewal] = asyncio.create_task(self._renew(job))
        if shown and shown.serves(job.order.rental_id, job.host.host_keys, self.wall(), JUST_VALID_S):
            return
        await asyncio.wait([self._renewing[renewal]], timeout=CERTIFY_WITHIN_S)

    async def stop(self) -> None:
        for task in (running := list(self._renewing.values())):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _renew(self, job: Job) -> None:
        try:
            issued = await self.issue(job.host)
            if issued is None or job.order.rental_id not in issued.rental_ids:
                return
            certifying = replace(job, action=Action.CERTIFY, deadline_s=CERTIFY_WITHIN_S)
            outcome = await self.engine.run(certifying.with_order(host_certificate=issued.line, public_keys=()))
            if outcome.ok:
                self.shows(job.host.worker_id, issued)
            else:
                log.warning("host certificate not renewed", worker_id=job.host.worker_id, reason=outcome.message)
        except Exception:
            log.exception("host certificate not renewed", worker_id=job.host.worker_id)
        finally:
            del self._renewing[job.host.worker_id, job.owner]


@dataclass
class CertifyingEngine:
    """An engine that adds certificates to the jobs of another one."""

    engine: Engine
    certificates: HostCertificates
    user_authority: str

    async def run(self, job: Job) -> Outcome:
        if job.action not in {Action.CREATE, Action.PREPARE}:
            return await self.engine.run(job)
        job = job.with_order(user_authority=self.user_authority)
        issued = await self.certificates.naming(job) if job.action is Action.CREATE else None
        if issued is None:
            return await self.engine.run(job)
        outcome = await self.engine.run(job.with_order(host_certificate=issued.line))
        if outcome.ok:
            self.certificates.shows(job.host.worker_id, issued)
        return outcome


def _keep_newest(known: dict[str, Issued], worker_id: str, issued: Issued, now: float) -> None:
    """Keep the certificate with the highest serial for this worker, and drop all that have ended."""
    for ended in [w for w, one in known.items() if one.valid_until <= now]:
        del known[ended]
    before = known.get(worker_id)
    if before is None or before.serial < issued.serial:
        known[worker_id] = issued
