"""The metrics: they follow what happens, and contain no names."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.harness import Harness

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def figures(harness: Harness) -> Figures:
    reply = await harness.as_admin.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(reply.text))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def of(found: Figures, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


async def test_an_empty_platform_has_counts_of_zero(harness: Harness) -> None:
    found = await figures(harness)
    for health in ("joining", "ready", "suspect", "unknown", "down", "quarantined"):
        assert of(found, "orion_workers", health=health) == 0
    for state in ("queued", "provisioning", "active", "migrating", "releasing"):
        assert of(found, "orion_rentals", state=state) == 0
    assert of(found, "orion_slots") == of(found, "orion_slots_free") == 0
    assert of(found, "orion_brake") == 1, "the manager has just started"
    assert of(found, "orion_database_bytes") > 4096
    assert of(found, "process_resident_memory_bytes") > 1e6
    assert {labels for name, labels in found if name == "orion_loop_late_seconds"} == {
        (("loop", name),)
        for name in ("health", "reconciler", "expiry", "copies", "engine log", "sessions", "retention", "door")
    }


async def test_metrics_follow_what_happens(harness: Harness) -> None:
    first = await harness.join(slots=2)
    await harness.join()
    harness.end_the_brake_of_the_start()
    rental = await harness.rent()
    await first.beat()
    found = await figures(harness)
    assert of(found, "orion_workers", health="ready") == 2
    assert of(found, "orion_rentals", state="active") == 1
    assert (of(found, "orion_slots"), of(found, "orion_slots_free")) == (3, 2)
    assert of(found, "orion_brake") == 0
    assert of(found, "orion_rent_seconds_count", status="202") == 1
    assert of(found, "orion_engine_job_seconds_count", action="create", outcome="ok") == 1
    assert of(found, "orion_engine_job_seconds_count", action="reach", outcome="ok") == 2
    assert of(found, "orion_heartbeats_total", outcome="renewed") == 1
    assert of(found, "orion_migrations_total") == 0
    assert of(found, "orion_events_committed_total", kind="rental.activated") == 1
    assert of(found, "orion_last_event_id") == max(event["id"] for event in await harness.events())
    dead = harness.agent_of(rental)
    dead.die()
    await harness.silence(dead, 95)
    found = await figures(harness)
    assert of(found, "orion_migrations_total") == 1
    assert of(found, "orion_workers", health="down") == 1


@pytest.mark.parametrize("code", ["name_taken", "idempotency_conflict"])
async def test_refusals_are_counted_by_code(harness: Harness, code: str) -> None:
    for name in ("one", "one" if code == "name_taken" else "two"):
        headers = {"Idempotency-Key": "key"} if code == "idempotency_conflict" else {}
        await harness.as_admin.post("/api/rent", json={"wait_s": 0, "name": name}, headers=headers)
    assert of(await figures(harness), "orion_rents_refused_total", code=code) == 1


async def test_a_job_that_fails_and_a_heartbeat_that_is_stale_are_told_apart(harness: Harness) -> None:
    agent = await harness.join()
    agent.node.failure = "no space left"
    await harness.rent()
    await agent.beat(session_id="another-session")
    found = await figures(harness)
    assert of(found, "orion_engine_job_seconds_count", action="create", outcome="failed") >= 1
    assert of(found, "orion_heartbeats_total", outcome="stale") == 1


async def test_metrics_contain_no_names(harness: Harness) -> None:
    agent = await harness.join()
    rental = await harness.rent(name="secret-project")
    text = (await harness.as_admin.get("/metrics")).text
    for word in ("secret-project", rental["id"], agent.worker_id, agent.hostname, "admin"):
        assert word not in text
