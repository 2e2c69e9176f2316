"""The composition root: makes and joins the controllers, the objects that they share, and the routes."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from fastapi import FastAPI

from orion import __version__
from orion.manager.ansible.port import Engine
from orion.manager.api import (
    access,
    admin,
    contract,
    operations,
    problems,
    rentals,
    snapshots,
    terminals,
    web_ports,
    workers,
)
from orion.manager.api.bodies import Bodies
from orion.manager.api.call_home import CallHome
from orion.manager.api.event_streams import EventStreams
from orion.manager.api.heartbeat import HeartbeatRoute, HeartbeatServices
from orion.manager.api.metrics import Metrics
from orion.manager.api.proxy_guard import ProxyGuard
from orion.manager.api.services import Services
from orion.manager.api.visible_rentals import VisibleRentals
from orion.manager.authentication import Authentication
from orion.manager.controllers.callbacks import Callbacks
from orion.manager.controllers.expiry import ExpiryController
from orion.manager.controllers.health import HealthController
from orion.manager.controllers.job_log import JobLog, LoggedEngine
from orion.manager.controllers.loop import Loop
from orion.manager.controllers.proxy_probe import ProxyProbe
from orion.manager.controllers.reconciler import Reconciler
from orion.manager.controllers.retention import RetentionController
from orion.manager.controllers.snapshots import SnapshotController
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.domain.leases import Leases
from orion.manager.domain.overdue import MAX_SHOWN, Overdue, overdue, workers_to_look_at
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import Health
from orion.manager.gateway.port_access import PortAccess
from orion.manager.gateway.port_connections import EndConnections, PortConnections
from orion.manager.gateway.port_keys import PortKeys
from orion.manager.gateway.running_rental import RunningRentals
from orion.manager.gateway.sessions import Sessions
from orion.manager.gateway.ssh_sessions import SshSessions
from orion.manager.gateway.terminal_sessions import TerminalSessions
from orion.manager.gateway.tickets import Terminals, Tickets
from orion.manager.gateway.token_lifetime import TokenUses
from orion.manager.operations.host_certificates import CertifyingEngine, HostCertificates
from orion.manager.operations.liveness import LivenessConnections
from orion.manager.operations.migrate import Migrator
from orion.manager.operations.preconnect import Preconnector
from orion.manager.operations.restore import Restorer
from orion.manager.operations.task_runner import TaskRunner
from orion.manager.operations.thaw import Thawer
from orion.manager.settings import Secrets, Settings
from orion.manager.snapshots.port import SnapshotService
from orion.manager.ssh.authority import Authority
from orion.manager.ssh.port import Liveness, Reach, Shells
from orion.manager.ssh.shell import SshShells
from orion.manager.store import tokens
from orion.manager.store import workers as worker_rows
from orion.manager.store.database import Store
from orion.manager.store.snapshots import SqlSnapshotCatalog
from orion.manager.store.sql import SqlStateStore

log = structlog.get_logger()

GARBAGE_THRESHOLDS = 5_000, 20, 100
"""Objects per generation of the garbage collector. Those of a request die young, so the oldest is seldom searched."""


@dataclass(kw_only=True)
class Ports:
    """The ports to the world outside the manager: real ones in main.py, fakes in tests."""

    engine: Engine
    reach: Reach
    snapshot_service: SnapshotService
    proxy_probe: ProxyProbe | None
    """The proxy probe; None: there is no proxy, as in some tests."""
    snapshots_disk: Callable[[], float]
    """The used share of the disk of the snapshots, by its bytes or its inodes: from 0 to 1."""
    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    liveness: Liveness | None = None
    """The port that opens liveness connections; None: deaths are found by leases alone."""
    shells: Shells | None = None
    """The port that opens shells; None: the workers' sshd, with certificates of this manager's own authority."""
    boot_time: Callable[[], float] | None = None
    """The seconds since the machine booted; None: as `monotonic`."""
    boot_id: int = 0
    """The boot of the machine from which `boot_time` counts."""
    end_connections: EndConnections | None = None
    """The function that ends connections in the port proxies of workers; None: there are none, as in some tests."""


class Manager:
    """The controllers, the objects that they share, and the services of the routers."""

    def __init__(self, *, settings: Settings, secrets: Secrets, store: Store, ports: Ports) -> None:
        self.store, self.clocks, self._ports, self._secrets = store, settings.clocks, ports, secrets
        monotonic, wall, snapshot_service = ports.monotonic, ports.wall, ports.snapshot_service
        self.leases = Leases(settings.clocks.freeze_after_s)
        self.state_store = SqlStateStore(store)
        self.pool_index = PoolIndex()
        self.clock = TrustedClock(now=ports.boot_time or monotonic, wall=wall, boot=ports.boot_id, store=store)
        self.engine_log = JobLog(store)
        self.authority = Authority(secrets.host_authority, secrets.user_authority, wall)
        logged = LoggedEngine(engine=ports.engine, note=self.engine_log.note, monotonic=monotonic, wall=wall)
        self.certificates = HostCertificates(store=store, authority=self.authority, engine=logged, wall=wall)
        engine = CertifyingEngine(logged, self.certificates, self.authority.of_users)
        token_clock = self.clock.wall_of_tokens
        self.authentication = Authentication(store, token_clock)
        self.token_uses = TokenUses(store, token_clock)
        self.event_streams = EventStreams(store)
        self.sessions = Sessions(store, monotonic)
        self.retention = RetentionController(store, settings.events_kept, self.clock.wall_of_removals)
        self.terminals = Terminals(monotonic)
        self.port_connections = PortConnections(
            store=store, pool_index=self.pool_index, end_connections=ports.end_connections, wall=token_clock
        )
        catalog, limits = SqlSnapshotCatalog(store), settings.snapshots.limits
        restorer = Restorer(engine=engine, snapshot_service=snapshot_service, catalog=catalog, limits=limits)
        migrator = Migrator(
            engine=engine, snapshot_service=snapshot_service, catalog=catalog, limits=limits, monotonic=monotonic
        )
        # Callbacks join objects that call each other, and are subscribed to when both objects are made.
        task_ended, worker_changed, liveness_changed = Callbacks[[]](), Callbacks[[]](), Callbacks[str]()
        job_ended = Callbacks[str, bool, float]()
        self.task_runner = TaskRunner(
            state_store=self.state_store,
            pool_index=self.pool_index,
            leases=self.leases,
            engine=engine,
            reach=ports.reach,
            restorer=restorer,
            migrator=migrator,
            monotonic=monotonic,
            wall=wall,
            counts_from=self.clock.counts_from,
            wake_reconciler=task_ended,
            on_worker_change=worker_changed,
            on_job=job_ended,
        )
        self.reconciler = Reconciler(
            state_store=self.state_store,
            pool_index=self.pool_index,
            leases=self.leases,
            task_runner=self.task_runner,
            monotonic=monotonic,
            wall=wall,
            awaits_files_s=settings.awaits_files_s,
        )
        wake_reconciler = self.reconciler.loop.hint
        task_ended.subscribe(wake_reconciler)
        self.snapshots = SnapshotController(
            catalog=catalog,
            snapshot_service=snapshot_service,
            plan=settings.snapshots,
            disk_share=ports.snapshots_disk,
            monotonic=monotonic,
            wall=self.clock.wall_of_removals,
        )
        store.news.follow(self.snapshots.on_events)
        probe = ports.proxy_probe
        self.liveness = LivenessConnections(ports.liveness, monotonic, liveness_changed) if ports.liveness else None
        self.health = HealthController(
            state_store=self.state_store,
            pool_index=self.pool_index,
            leases=self.leases,
            clocks=settings.clocks,
            proxy_answers=lambda: probe is None or probe.answers,
            monotonic=monotonic,
            on_verdict=wake_reconciler,
            liveness=self.liveness,
        )
        worker_changed.subscribe(self.health.loop.hint)
        self.readiness = Preconnector(self.state_store, self.pool_index, snapshot_service)
        liveness_changed.subscribe(self.health.judge_soon)
        liveness_changed.subscribe(self._prepare_for_loss)
        self.expiry = ExpiryController(
            state_store=self.state_store, clock=self.clock, wall=wall, on_expiry=wake_reconciler
        )
        self.metrics = Metrics(
            pool_index=self.pool_index,
            leases=self.leases,
            loops={loop.name: loop for loop in self.loops},
            brake=self._brake,
            committed=store.news.committed,
            running_jobs=lambda: self.task_runner.running,
            database_url=store.url,
            clock_is_believed=lambda: not self.clock.problem,
        )
        job_ended.subscribe(self.metrics.job_ended)
        self.port_access = PortAccess(
            store=store,
            clock=self.clock,
            authentication=self.authentication,
            connections=self.port_connections,
            tickets=Tickets(monotonic),
            keys=PortKeys(secrets.proxy_secret),
        )
        routers = self._services_of_routers(settings, Thawer(engine, catalog))
        self.services: Services = {type(services): services for services in routers}

    def _services_of_routers(self, settings: Settings, thawer: Thawer) -> tuple[object, ...]:
        """Return the services of the routers, and the one that authenticates their requests."""
        store, ports, wake_reconciler = self.store, self._ports, self.reconciler.loop.hint
        visible = VisibleRentals(
            store=store,
            clock=self.clock,
            monotonic=ports.monotonic,
            token_uses=self.token_uses,
            why_old=self.snapshots.explain_age,
        )
        call_home = CallHome(
            registry=self.state_store,
            pool_index=self.pool_index,
            leases=self.leases,
            reach=ports.reach,
            monotonic=ports.monotonic,
            on_inventory=self.reconciler.compare,
            on_return=self.health.mark_due,
        )
        return (
            self.authentication,
            HeartbeatServices(
                clocks=settings.clocks,
                pool_index=self.pool_index,
                leases=self.leases,
                call_home=call_home,
                wall=ports.wall,
                wake_health=self.health.loop.hint,
                wake_reconciler=wake_reconciler,
            ),
            workers.WorkerServices(
                settings=settings,
                store=store,
                pool_index=self.pool_index,
                leases=self.leases,
                call_home=call_home,
                authorized_keys=(self._secrets.ssh_public_key,),
                wake_health=self.health.loop.hint,
                wake_reconciler=wake_reconciler,
            ),
            rentals.RentalServices(
                rentals=visible,
                store=store,
                clock=self.clock,
                monotonic=ports.monotonic,
                wall=ports.wall,
                metrics=self.metrics,
                wake_reconciler=wake_reconciler,
                thaw=thawer.thaw,
                migrate=self.reconciler.begin_migration,
                engine_log=self.engine_log.of,
            ),
            access.AccessServices(
                rentals=visible,
                store=store,
                authority=self.authority,
                app_address=str(settings.app_address),
                wake_reconciler=wake_reconciler,
            ),
            snapshots.SnapshotServices(
                rentals=visible,
                store=store,
                token_uses=self.token_uses,
                snapshot_now=self.snapshots.take_now,
                wake_reconciler=wake_reconciler,
            ),
            operations.OperationServices(
                store=store,
                pool_index=self.pool_index,
                clock=self.clock,
                brake=self._brake,
                snapshots_paused=lambda: self.snapshots.paused or None,
                overdue=self._overdue,
                metrics=self.metrics,
                event_streams=self.event_streams,
                token_uses=self.token_uses,
            ),
            admin.AdminServices(
                database_url=settings.database_url,
                clock=self.clock,
                token_uses=self.token_uses,
                restart=lambda: os.kill(os.getpid(), signal.SIGTERM),
            ),
            *self._services_of_the_gateway(settings, visible),
        )

    def _services_of_the_gateway(self, settings: Settings, visible: VisibleRentals) -> tuple[object, ...]:
        """Return the services of the routers of ssh, terminals and web ports."""
        store, ports = self.store, self._ports
        running_rentals = RunningRentals(store, self.clock, ports.monotonic)
        ssh_sessions = SshSessions(
            rentals=running_rentals,
            sessions=self.sessions,
            token_uses=self.token_uses,
            leases=self.leases,
            certify=self.certificates.ensure,
            monotonic=ports.monotonic,
        )
        terminal_sessions = TerminalSessions(
            store=store,
            clock=self.clock,
            rentals=running_rentals,
            sessions=self.sessions,
            token_uses=self.token_uses,
            terminals=self.terminals,
            shells=ports.shells or SshShells(self.authority, str(settings.app_address)),
            monotonic=ports.monotonic,
        )
        return (
            ssh_sessions,
            terminals.TerminalServices(rentals=visible, sessions=terminal_sessions),
            web_ports.WebPortServices(
                rentals=visible, store=store, access=self.port_access, apps_domain=settings.apps_domain
            ),
        )

    @property
    def loops(self) -> list[Loop]:
        deciding = (self.health, self.reconciler, self.expiry, self.snapshots)
        probes = (self._ports.proxy_probe,) if self._ports.proxy_probe else ()
        return [each.loop for each in (*deciding, self.engine_log, self.sessions, self.retention, *probes)]

    def _prepare_for_loss(self, worker_id: str) -> None:
        """Prepare for the loss of a worker if its liveness connection has ended."""
        if self.liveness and self.liveness.is_closed(worker_id):
            self.readiness.prepare_for_loss_of(worker_id)

    def _brake(self) -> str | None:
        return self.health.brake.reason if self.health.brake.on else None

    async def _overdue(self) -> list[Overdue]:
        now = self._ports.monotonic()
        late = workers_to_look_at(self.pool_index, now)
        world, ages = await self.reconciler.overdue_world(late)
        since = {w: self.pool_index.since(w) for w in late}
        ages |= {worker_id: now - at for worker_id, at in since.items() if at is not None}
        return overdue(world, ages)[:MAX_SHOWN]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Restore the state from the database, run the loops during the block, and stop everything."""
        await self.restore()
        await self.health.round()  # before anything is placed: no worker has called yet, and some may be gone for good
        running = [asyncio.create_task(loop.run(), name=loop.name) for loop in self.loops]
        running.append(asyncio.create_task(self._let_old_leases_lapse()))
        self.port_connections.begin()
        try:
            yield
        finally:
            await self.port_connections.stop()
            await self.event_streams.stop()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for each in (self.snapshots, self.task_runner, self.readiness, self.certificates):
                await each.stop()
            await self.engine_log.flush()
            await self.sessions.flush()
            if self.liveness:
                await self.liveness.stop()
            if self._ports.proxy_probe:
                await self._ports.proxy_probe.close()

    async def restore(self) -> None:
        """Restore tokens, clock, pool index and leases from the secrets and the database."""
        await self.store.write(tokens.install, "admin", self._secrets.admin_token)
        await self.store.write(tokens.install, "join", self._secrets.join_token)
        await self.clock.begin()
        await self.state_store.follow(lambda changes: self.pool_index.apply(changes, self._ports.monotonic()))
        in_session = ((w, k) for w, k in self.pool_index.items() if k.health is not Health.DOWN)
        sessions = {worker_id: known.session_id for worker_id, known in in_session if known.session_id}
        granted_s = max(await self.store.read(worker_rows.granted_lease), self.clocks.freeze_after_s)
        await self.store.write(worker_rows.grant_lease, granted_s)
        self.leases.restore(sessions, granted_s)

    async def _let_old_leases_lapse(self) -> None:
        """Write the shorter lease of new settings once no lease of the former, longer ones can be valid any more."""
        granted_s = await self.store.read(worker_rows.granted_lease)
        if granted_s > self.clocks.freeze_after_s:
            await asyncio.sleep(2 * granted_s)
            await self.store.write(worker_rows.grant_lease, self.clocks.freeze_after_s)


def build(settings: Settings, secrets: Secrets, store: Store, ports: Ports) -> FastAPI:
    """Return the application, whose lifespan runs the manager."""
    app = application(secrets.proxy_secret)
    put_into(app, Manager(settings=settings, secrets=secrets, store=store, ports=ports))
    return app


def put_into(app: FastAPI, manager: Manager) -> None:
    """Make this the manager that the application serves."""
    app.state.services = manager.services
    app.state.manager = manager


def application(proxy_secret: str) -> FastAPI:
    """Return the application with all routes behind the proxy guard, and no manager yet: see `put_into`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with app.state.manager.running():
            # Exempt all loaded objects from garbage collection, which would block the event loop for 0.1 s and more.
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GARBAGE_THRESHOLDS)
            log.info("manager ready", version=__version__, clocks=vars(app.state.manager.clocks))
            yield

    app = FastAPI(
        title="Orion-Sec",
        version=__version__,
        openapi_url=None,  # see api/contract.py
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},  # see api/metrics.py
        redirect_slashes=False,  # a redirect would send a client to whatever its Host header says
        lifespan=lifespan,
    )
    app.add_middleware(HeartbeatRoute)
    problems.install(app)
    contract.describe(app)
    for module in (workers, rentals, access, snapshots, operations, admin, terminals, web_ports):
        app.include_router(module.router)
    app.include_router(web_ports.inside)
    app.add_middleware(Bodies)
    app.add_middleware(ProxyGuard, secret=proxy_secret.encode())
    return app
