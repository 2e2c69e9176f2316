"""The metrics of `GET /metrics`, in the text format of Prometheus. docs/operations.md lists names and alerts.

Gauges and counters are read at each scrape from what the manager holds anyway; only durations are recorded as they
occur. Metrics keep their released names, also where the help text has a newer word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
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


@dataclass(kw_only=True)
class MetricSources:
    """The objects that are read at each scrape."""

    pool_index: PoolIndex
    leases: Leases
    loops: Mapping[str, Loop]
    brake: Callable[[], str | None]
    committed: Mapping[str, int]
    """The number of events committed since the start, by kind."""
    running_jobs: Callable[[], int]
    database_url: str
    clock_is_believed: Callable[[], bool]


@dataclass
class Metrics:
    """The metrics of one manager, in a registry of its own, so that several managers may run in one process."""

    sources: MetricSources
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    last_event: int = 0

    def __post_init__(self) -> None:
        ProcessCollector(registry=self.registry)
        self.registry.register(_SourceCollector(self))
        self._rents = Histogram(
            "orion_rent_seconds",
            "Seconds from POST /api/rent to its reply, by status: 201 active, 202 not active after wait_s",
            ["status"],
            buckets=RENT_BUCKETS_S,
            registry=self.registry,
        )
        self._jobs = Histogram(
            "orion_engine_job_seconds",
            "Seconds of jobs of the Ansible engine and of attempts to reach workers",
            ["action", "outcome"],
            buckets=JOB_BUCKETS_S,
            registry=self.registry,
        )
        self._refused = Counter("orion_rents_refused_total", "Refused rents, by code", ["code"], registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def rented(self, status: int, seconds: float) -> None:
        self._rents.labels(str(status)).observe(seconds)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def job_ended(self, action: str, ok: bool, seconds: float) -> None:
        self._jobs.labels(action, "ok" if ok else "failed").observe(seconds)


class _SourceCollector(Collector):
    """The collector of all metrics that are read at a scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return ()  # without this, the registry would collect everything while the manager is constructed

    def collect(self) -> Iterator[Metric]:
        yield from self._pool()
        yield from self._traffic()
        yield from self._loops()
        yield from self._database()

    def _pool(self) -> Iterator[Metric]:
        pool_index, brake = self._metrics.sources.pool_index, self._metrics.sources.brake()
        health, state, (slots, free) = pool_index.by_health(), pool_index.by_state(), pool_index.slots()
        yield _labelled(
            GaugeMetricFamily, "orion_workers", "Workers, by health", "health", {h: health.get(h, 0) for h in Health}
        )
        living = (s for s in RentalState if s not in ENDED)
        yield _labelled(
            GaugeMetricFamily,
            "orion_rentals",
            "Rentals that have not ended, by state",
            "state",
            {s: state.get(s, 0) for s in living},
        )
        yield GaugeMetricFamily("orion_slots", "Slots of all ready workers", slots)
        yield GaugeMetricFamily("orion_slots_free", "Free slots of all ready workers", free)
        yield GaugeMetricFamily(
            "orion_brake", "1 while the brake is on: no silent worker is declared down", int(brake is not None)
        )
        believed = int(self._metrics.sources.clock_is_believed())
        yield GaugeMetricFamily(
            "orion_clock_believed", "0 while no rental expires because the clock is doubted", believed
        )
        yield GaugeMetricFamily(
            "orion_restless_workers",
            "Dirty workers: the reconciler has to look at them",
            pool_index.number_of_dirty_workers,
        )

    def _traffic(self) -> Iterator[Metric]:
        sources = self._metrics.sources
        beats = {"renewed": sources.leases.renewed, "stale": sources.leases.stale}
        yield _labelled(
            CounterMetricFamily,
            "orion_heartbeats",
            "Heartbeats; a worker registers again after a stale one",
            "outcome",
            beats,
        )
        yield GaugeMetricFamily(
            "orion_engine_jobs_running", "Jobs of the Ansible engine that are running", sources.running_jobs()
        )
        moved = {kind: sources.committed.get(f"rental.{kind}", 0) for kind in ("moved", "parked", "migration_started")}
        planned = moved["moved"] + moved["parked"]
        lost = moved["migration_started"] - planned
        yield CounterMetricFamily("orion_migrations", "Takeovers: rentals whose worker was lost", lost)
        yield CounterMetricFamily("orion_planned_moves", "Planned migrations and parks, with all files", planned)
        yield _labelled(
            CounterMetricFamily,
            "orion_events_committed",
            "Events committed since the start, by kind",
            "kind",
            dict(sources.committed),
        )

    def _loops(self) -> Iterator[Metric]:
        rounds = CounterMetricFamily("orion_loop_rounds", "Rounds of a controller's loop", labels=["loop", "outcome"])
        seconds = CounterMetricFamily("orion_loop_seconds", "Seconds spent in rounds", labels=["loop"])
        late = GaugeMetricFamily(
            "orion_loop_late_seconds", "Seconds by which the last round began late", labels=["loop"]
        )
        for name, loop in self._metrics.sources.loops.items():
            rounds.add_metric([name, "ok"], loop.rounds)
            rounds.add_metric([name, "failed"], loop.failed_rounds)
            seconds.add_metric([name], loop.seconds)
            late.add_metric([name], loop.late_s)
        yield from (rounds, seconds, late)

    def _database(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("orion_last_event_id", "Id of the newest event", self._metrics.last_event)
        backups = Backups.of(self._metrics.sources.database_url)
        if backups:
            files = [backups.database.with_name(backups.database.name + suffix) for suffix in ("", "-wal")]
            yield GaugeMetricFamily(
                "orion_database_bytes", "Bytes of the database and its write-ahead log", sum(map(_size, files))
            )
        info = GaugeMetricFamily("orion_info", "Always 1; the label has the version", labels=["version"])
        info.add_metric([__version__], 1)
        yield info


def _labelled(
    family: type[GaugeMetricFamily | CounterMetricFamily], name: str, text: str, label: str, values: Mapping[str, int]
) -> Metric:
    found = family(name, text, labels=[label])
    for value, number in values.items():
        found.add_metric([str(value)], number)
    return found


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
