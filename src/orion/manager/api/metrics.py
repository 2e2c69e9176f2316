"""The metrics of `GET /metrics`, in the text format of Prometheus. docs/operations.md lists names and alerts.

Gauges and counters are read at each scrape from what the manager holds anyway; only durations are recorded as they
occur. Metrics keep their released names, also where the help text has a newer word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily as CounterFamily
from prometheus_client.core import GaugeMetricFamily as GaugeFamily
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from orion import __version__
from orion.manager.controllers.loop import Loop
from orion.manager.domain.leases import Leases
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import ENDED, Health, RentalState
from orion.manager.store.backup import Backups

MEDIA_TYPE = CONTENT_TYPE_LATEST
RENT_BUCKETS_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
JOB_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(kw_only=True, eq=False)
class Metrics(Collector):
    """The metrics of one manager, in a registry of its own, so that several managers may run in one process."""

    pool_index: PoolIndex
    leases: Leases
    loops: Mapping[str, Loop]
    brake: Callable[[], str | None]
    committed: Mapping[str, int]
    """The number of events committed since the start, by kind."""
    running_jobs: Callable[[], int]
    database_url: str
    clock_is_believed: Callable[[], bool]
    last_event: int = 0
    """The id of the newest event; the route sets it before each scrape."""

    def __post_init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self._rents = Histogram(
            "orion_rent_seconds",
            "Seconds from POST /api/rent to its reply, by status: 201 active, 202 not active after wait_s",
            ["status"],
            buckets=RENT_BUCKETS_S,
            registry=self._registry,
        )
        self._jobs = Histogram(
            "orion_engine_job_seconds",
            "Seconds of jobs of the Ansible engine and of attempts to reach workers",
            ["action", "outcome"],
            buckets=JOB_BUCKETS_S,
            registry=self._registry,
        )
        self._refused = Counter(
            "orion_rents_refused_total", "Refused rents, by code", ["code"], registry=self._registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def rented(self, status: int, seconds: float) -> None:
        self._rents.labels(str(status)).observe(seconds)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def job_ended(self, action: str, ok: bool, seconds: float) -> None:
        self._jobs.labels(action, "ok" if ok else "failed").observe(seconds)

    def describe(self) -> Iterable[Metric]:
        return ()  # without this, the registry would collect everything while the manager is constructed

    def collect(self) -> Iterator[Metric]:
        yield from (*self._pool(), *self._traffic(), *self._loops(), *self._database())

    def _pool(self) -> Iterator[Metric]:
        health, state, (slots, free) = self.pool_index.by_health(), self.pool_index.by_state(), self.pool_index.slots()
        all_health = {one: health.get(one, 0) for one in Health}
        living = {one: state.get(one, 0) for one in RentalState if one not in ENDED}
        brake, believed = int(self.brake() is not None), int(self.clock_is_believed())
        dirty = self.pool_index.number_of_dirty_workers
        yield _gauge("orion_workers", "Workers, by health", "health", all_health)
        yield _gauge("orion_rentals", "Rentals that have not ended, by state", "state", living)
        yield GaugeFamily("orion_slots", "Slots of all ready workers", slots)
        yield GaugeFamily("orion_slots_free", "Free slots of all ready workers", free)
        yield GaugeFamily("orion_brake", "1 while the brake is on: no silent worker is declared down", brake)
        yield GaugeFamily("orion_clock_believed", "0 while no rental expires because the clock is doubted", believed)
        yield GaugeFamily("orion_restless_workers", "Dirty workers: the reconciler has to look at them", dirty)

    def _traffic(self) -> Iterator[Metric]:
        beats = {"renewed": self.leases.renewed, "stale": self.leases.stale}
        planned = self.committed.get("rental.moved", 0) + self.committed.get("rental.parked", 0)
        lost = self.committed.get("rental.migration_started", 0) - planned
        yield _counter("orion_heartbeats", "Heartbeats; a worker registers again after a stale one", "outcome", beats)
        yield GaugeFamily(
            "orion_engine_jobs_running", "Jobs of the Ansible engine that are running", self.running_jobs()
        )
        yield CounterFamily("orion_migrations", "Takeovers: rentals whose worker was lost", lost)
        yield CounterFamily("orion_planned_moves", "Planned migrations and parks, with all files", planned)
        yield _counter(
            "orion_events_committed", "Events committed since the start, by kind", "kind", dict(self.committed)
        )

    def _loops(self) -> Iterator[Metric]:
        rounds = CounterFamily("orion_loop_rounds", "Rounds of a controller's loop", labels=["loop", "outcome"])
        for name, loop in self.loops.items():
            rounds.add_metric([name, "ok"], loop.rounds)
            rounds.add_metric([name, "failed"], loop.failed_rounds)
        seconds = {name: loop.seconds for name, loop in self.loops.items()}
        late = {name: loop.late_s for name, loop in self.loops.items()}
        yield rounds
        yield _counter("orion_loop_seconds", "Seconds spent in rounds", "loop", seconds)
        yield _gauge("orion_loop_late_seconds", "Seconds by which the last round began late", "loop", late)

    def _database(self) -> Iterator[Metric]:
        yield GaugeFamily("orion_last_event_id", "Id of the newest event", self.last_event)
        if backups := Backups.of(self.database_url):
            database = backups.database
            files = (database, database.with_name(f"{database.name}-wal"))
            size = sum(file.stat().st_size for file in files if file.exists())
            yield GaugeFamily("orion_database_bytes", "Bytes of the database and its write-ahead log", size)
        yield _gauge("orion_info", "Always 1; the label has the version", "version", {__version__: 1})


def _labelled(
    kind: type[GaugeFamily | CounterFamily], name: str, text: str, label: str, values: Mapping[Any, float]
) -> Metric:
    family = kind(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([str(value)], number)
    return family


_gauge, _counter = partial(_labelled, GaugeFamily), partial(_labelled, CounterFamily)
