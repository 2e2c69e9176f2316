"""The brake under any observations: it ends in time, and while it is on no silent worker is declared down."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from support.builders import new_worker

from orion.manager.domain.brake import Brake, Observation, advance
from orion.manager.domain.clocks import Clocks
from orion.manager.domain.health import Evidence, judge
from orion.manager.domain.leases import Lease
from orion.manager.domain.states import HEALTH_TABLE, Health

CLOCKS = Clocks()
TIMES = st.floats(0, 5000)
OBSERVATIONS = st.builds(
    Observation,
    proxy_answers=st.booleans(),
    late_s=st.floats(-1, 20),
    heard_at=st.none() | TIMES,
    silent_since=st.lists(TIMES, max_size=4).map(tuple),
    pool=st.integers(0, 6),
)
HISTORIES = st.lists(st.tuples(st.floats(0.1, 60), OBSERVATIONS), min_size=1, max_size=40)


@given(HISTORIES)
def test_a_brake_is_never_on_longer_than_brake_max(history: list[tuple[float, Observation]]) -> None:
    now, brake = 0.0, Brake.at_start(0.0)
    for seconds, seen in history:
        now += seconds
        brake = advance(brake, seen, now, CLOCKS)
        if brake.since is not None:
            assert now - brake.since < CLOCKS.brake_max_s


@given(OBSERVATIONS, st.lists(st.integers(1, 20), min_size=10, max_size=30))
def test_a_cause_that_never_clears_turns_the_brake_on_once(seen: Observation, seconds: list[int]) -> None:
    """Let rounds be late, or the proxy unreachable, in every round: after brake_max workers are judged again."""
    now, brake, ended = 0.0, Brake.at_start(0.0), False
    for pause_s in seconds * 3:
        now += pause_s
        late = replace(seen, silent_since=(), late_s=CLOCKS.door_answer_s + pause_s / 10, heard_at=now)
        brake = advance(brake, late, now, CLOCKS)
        ended = ended or not brake.on
        assert not (ended and brake.on)


@given(HISTORIES)
def test_a_brake_that_ends_early_had_a_reachable_proxy_for_takeover_after_and_a_heartbeat(
    history: list[tuple[float, Observation]],
) -> None:
    now, brake, shut_at = 0.0, Brake.at_start(0.0), 0.0
    for seconds, seen in history:
        now += seconds
        before, brake = brake, advance(brake, seen, now, CLOCKS)
        shut_at = shut_at if seen.proxy_answers else now
        if before.on and not brake.on and not brake.exhausted and now - before.since < CLOCKS.brake_max_s:
            assert now - shut_at >= CLOCKS.takeover_after_s
            assert seen.heard_at is not None


EVIDENCE = st.builds(
    Evidence,
    worker=st.builds(
        lambda health, session, verified, fault: new_worker(
            1, health=health, session_id=session, verified_session=verified, fault=fault
        ),
        st.sampled_from(Health),
        st.sampled_from(["session-1", "session-2"]),
        st.sampled_from([None, "session-1", "session-2"]),
        st.sampled_from(["", "it is broken"]),
    ),
    lease=st.none()
    | st.builds(
        Lease,
        session_id=st.sampled_from(["session-1", "session-2"]),
        received_at=st.none() | st.floats(0, 1000),
        exiting_at=st.none() | st.floats(0, 1000),
    ),
    now=st.floats(1000, 3000),
    clocks=st.just(CLOCKS),
    brake=st.builds(
        Brake,
        disturbed_at=st.floats(0, 3000),
        since=st.none() | st.floats(0, 3000),
        reason=st.just("why"),
    ),
    has_destination=st.booleans(),
    joining_s=st.floats(0, 600),
    losses=st.integers(0, 5),
)


@given(EVIDENCE)
def test_while_the_brake_is_on_no_silent_worker_is_declared_down(evidence: Evidence) -> None:
    verdict = judge(evidence)
    if evidence.brake.on:
        assert verdict is None or verdict.to is not Health.DOWN


@given(EVIDENCE)
def test_only_a_worker_silent_for_its_whole_lease_or_that_said_goodbye_is_declared_down(evidence: Evidence) -> None:
    verdict = judge(evidence)
    if verdict is None or verdict.to is not Health.DOWN:
        return
    lease = evidence.lease
    said_goodbye = lease is not None and lease.exiting_at is not None
    heard_at = lease.received_at if lease and lease.received_at is not None else 0.0
    assert said_goodbye or evidence.now - heard_at > CLOCKS.takeover_after_s
    assert said_goodbye or evidence.now - evidence.brake.disturbed_at > CLOCKS.takeover_after_s


@given(EVIDENCE)
def test_a_worker_becomes_ready_only_with_a_heartbeat_and_verified_in_its_current_session(evidence: Evidence) -> None:
    verdict = judge(evidence)
    if verdict is None or verdict.to is not Health.READY:
        return
    worker, lease = evidence.worker, evidence.lease
    assert lease is not None
    assert worker.session_id == worker.verified_session == lease.session_id
    assert evidence.now - lease.received_at <= CLOCKS.suspect_after_s


@given(EVIDENCE)
def test_a_verdict_is_always_a_step_of_the_table(evidence: Evidence) -> None:
    verdict = judge(evidence)
    if verdict is not None:
        assert verdict.to in HEALTH_TABLE[evidence.worker.health].exits
        assert verdict.reason
