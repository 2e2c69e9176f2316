"""The verdicts on a worker: each rule of each health, and the verdicts that never come."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.builders import SESSION, new_worker

from orion.manager.domain.brake import Brake
from orion.manager.domain.clocks import Clocks
from orion.manager.domain.health import LIVENESS_ENDED, MAX_FLAPS, RULES, Evidence, LivenessReport, Verdict, judge
from orion.manager.domain.leases import Lease
from orion.manager.domain.model import Worker
from orion.manager.domain.states import JOIN_DEADLINE_S, Health

CLOCKS = Clocks()
NOW = 10_000.0
OFF = Brake(disturbed_at=0.0, since=None, reason="")
ON = Brake(disturbed_at=0.0, since=NOW - 10, reason="because")


def evidence(health: Health, silent_s: float = 1.0, **change: Any) -> Evidence:
    """Return the evidence of a verified worker `silent_s` after its last heartbeat, with changes of the records."""
    worker = replace(new_worker(health=health), **change.pop("worker", {}))
    lease = replace(
        Lease(session_id=SESSION, received_at=NOW - silent_s, seq=5, inventory=(), lease_s=CLOCKS.freeze_after_s),
        **change.pop("lease", {}),
    )
    fields = {"brake": OFF, "has_destination": True} | change
    return Evidence(worker=worker, lease=lease, now=NOW, clocks=CLOCKS, **fields)


def verdict(health: Health, silent_s: float = 1.0, **change: Any) -> Health | None:
    found = judge(evidence(health, silent_s, **change))
    return found.to if found else None


UNVERIFIED = {"worker": {"verified_session": None}}
NOT_HEARD_YET = {"lease": {"received_at": None, "inventory": None}}
GOODBYE = {"lease": {"exiting_at": NOW - CLOCKS.goodbye_after_s}}


def test_each_state_has_its_rules() -> None:
    assert set(RULES) == set(Health)


def test_a_ready_worker_with_heartbeats_stays_ready() -> None:
    assert verdict(Health.READY) is None


@pytest.mark.parametrize(("silent_s", "to"), [(39.9, None), (40.0, None), (40.1, Health.SUSPECT)])
@pytest.mark.parametrize("health", [Health.READY, Health.JOINING])
def test_silence_makes_a_worker_suspect(health: Health, silent_s: float, to: Health | None) -> None:
    unverified = UNVERIFIED if health is Health.JOINING else {}
    assert verdict(health, silent_s, **unverified) is to


def test_a_silent_worker_becomes_suspect_also_during_a_brake() -> None:
    assert verdict(Health.READY, 41, brake=ON) is Health.SUSPECT


def test_a_new_grace_does_not_hide_the_silence_of_a_worker() -> None:
    just_disturbed = Brake(
        disturbed_at=NOW - 1, since=NOW - 1, reason="the manager cannot reach itself through the proxy"
    )
    assert verdict(Health.READY, 41, brake=just_disturbed) is Health.SUSPECT


@pytest.mark.parametrize("health", [Health.SUSPECT, Health.UNKNOWN, Health.QUARANTINED])
@pytest.mark.parametrize(("silent_s", "to"), [(90.0, None), (90.1, Health.DOWN)])
def test_a_worker_is_down_when_its_lease_has_passed(health: Health, silent_s: float, to: Health | None) -> None:
    broken = {"worker": {"fault": "broken"}} if health is Health.QUARANTINED else {}
    assert verdict(health, silent_s, **broken) is to
    assert verdict(health, silent_s, brake=ON, **broken) is None


def test_a_ready_worker_is_suspect_before_it_is_down_however_long_the_silence_was() -> None:
    assert verdict(Health.READY, 5000) is Health.SUSPECT


def test_after_the_end_of_a_brake_each_worker_has_the_whole_grace_again() -> None:
    just_ended = Brake(disturbed_at=NOW - 90, since=None, reason="")
    assert verdict(Health.SUSPECT, 5000, brake=just_ended) is None
    assert verdict(Health.SUSPECT, 5000, brake=replace(just_ended, disturbed_at=NOW - 90.1)) is Health.DOWN


def test_a_worker_that_lives_by_a_longer_lease_of_former_clocks_gets_the_grace_of_those() -> None:
    longer = {"lease": {"lease_s": 10 * CLOCKS.freeze_after_s}}
    assert verdict(Health.SUSPECT, 899, **longer) is None
    assert verdict(Health.SUSPECT, 901, **longer) is Health.DOWN


def test_a_shorter_lease_than_the_clocks_ask_for_takes_no_grace_away() -> None:
    assert verdict(Health.SUSPECT, 90, lease={"lease_s": 0.0}) is None


@pytest.mark.parametrize("health", [Health.SUSPECT, Health.UNKNOWN])
def test_a_verified_worker_is_ready_at_its_next_heartbeat(health: Health) -> None:
    assert verdict(health) is Health.READY


@pytest.mark.parametrize("health", [Health.READY, Health.SUSPECT, Health.UNKNOWN, Health.DOWN])
def test_a_worker_that_registered_again_is_checked_again(health: Health) -> None:
    assert verdict(health, worker={"session_id": "new", "verified_session": SESSION}, lease={"session_id": "new"}) is (
        Health.JOINING
    )


def test_a_down_worker_stays_down_until_a_heartbeat_in_a_valid_session() -> None:
    down = new_worker(health=Health.DOWN)
    assert judge(Evidence(worker=down, lease=None, now=NOW, clocks=CLOCKS, brake=OFF, has_destination=True)) is None
    assert verdict(Health.DOWN, lease={"session_id": "another"}, worker={"verified_session": None}) is None
    assert verdict(Health.DOWN, silent_s=41, **UNVERIFIED) is None


def test_the_manager_s_own_absence_makes_a_ready_worker_unknown_and_not_suspect() -> None:
    assert verdict(Health.READY, **NOT_HEARD_YET) is Health.UNKNOWN


@pytest.mark.parametrize(("since_start_s", "to"), [(180.0, None), (180.1, Health.DOWN)])
@pytest.mark.parametrize("health", [Health.UNKNOWN, Health.SUSPECT])
def test_a_worker_without_a_heartbeat_since_the_manager_s_start_has_a_doubled_grace(
    health: Health, since_start_s: float, to: Health | None
) -> None:
    started = Brake(disturbed_at=NOW - since_start_s, since=None, reason="")
    assert verdict(health, brake=started, **NOT_HEARD_YET) is to


@pytest.mark.parametrize("health", [health for health in RULES if health is not Health.DOWN])
def test_a_goodbye_is_acted_on_late_with_a_destination_and_without_a_brake(health: Health) -> None:
    unchanged = verdict(health)
    assert verdict(health, **GOODBYE) is Health.DOWN
    assert verdict(health, lease={"exiting_at": NOW - CLOCKS.goodbye_after_s + 0.1}) is unchanged
    assert verdict(health, **GOODBYE, has_destination=False) is unchanged
    assert verdict(health, **GOODBYE, brake=ON) is unchanged


def test_a_worker_that_said_goodbye_is_suspect_where_no_worker_can_take_its_rentals() -> None:
    assert verdict(Health.READY, 41, **GOODBYE, has_destination=False) is Health.SUSPECT


def test_a_joining_worker_is_ready_when_it_is_verified_and_has_sent_a_heartbeat() -> None:
    assert verdict(Health.JOINING) is Health.READY
    assert verdict(Health.JOINING, **UNVERIFIED) is None
    assert verdict(Health.JOINING, worker={"session_id": "new"}) is None


def test_a_worker_at_fault_is_quarantined_and_the_reason_says_how_to_go_on() -> None:
    found = judge(evidence(Health.JOINING, worker={"fault": "rental x could not be cleaned up"}))
    assert found.to is Health.QUARANTINED
    assert found.reason == "rental x could not be cleaned up. Look at it, then: orion resume w-0001"


@pytest.mark.parametrize(("losses", "to"), [(MAX_FLAPS - 1, Health.READY), (MAX_FLAPS, Health.QUARANTINED)])
def test_a_worker_that_flaps_is_quarantined(losses: int, to: Health) -> None:
    assert verdict(Health.JOINING, losses=losses) is to


@pytest.mark.parametrize(("joining_s", "to"), [(JOIN_DEADLINE_S, None), (JOIN_DEADLINE_S + 0.1, Health.QUARANTINED)])
def test_a_worker_that_cannot_be_verified_in_time_is_quarantined(joining_s: float, to: Health | None) -> None:
    assert verdict(Health.JOINING, joining_s=joining_s, **UNVERIFIED) is to


def test_the_reason_of_a_join_that_took_too_long_is_what_went_wrong_last() -> None:
    late = evidence(Health.JOINING, joining_s=301, worker={"verified_session": None, "explanation": "no route"})
    assert judge(late).reason.startswith("no route.")


def test_a_worker_that_was_checked_is_ready_though_it_took_too_long() -> None:
    assert verdict(Health.JOINING, joining_s=301) is Health.READY


def test_a_quarantined_worker_stays_so_until_an_operator_resumes_it() -> None:
    assert verdict(Health.QUARANTINED, worker={"fault": "broken"}) is None
    assert verdict(Health.QUARANTINED) is Health.JOINING


def test_a_resumed_worker_without_heartbeats_stays_quarantined() -> None:
    assert verdict(Health.QUARANTINED, 41) is None


def test_a_quarantined_worker_is_not_ready_by_its_heartbeats() -> None:
    assert all(
        verdict(Health.QUARANTINED, worker={"fault": "broken", "verified_session": verified}) is None
        for verified in (None, SESSION)
    )


def test_the_reason_of_a_verdict_says_how_long_the_worker_was_silent() -> None:
    assert judge(evidence(Health.SUSPECT, 91)).reason == "no heartbeat for 91 s"


def test_a_worker_without_any_lease_is_judged_by_the_manager_s_start() -> None:
    orphan: Worker = new_worker(health=Health.SUSPECT)
    started = Brake(disturbed_at=NOW - 181, since=None, reason="")
    assert (
        judge(Evidence(worker=orphan, lease=None, now=NOW, clocks=CLOCKS, brake=started, has_destination=False)).to
        is Health.DOWN
    )
    assert (
        judge(
            Evidence(
                worker=orphan,
                lease=None,
                now=NOW,
                clocks=CLOCKS,
                brake=replace(started, disturbed_at=NOW - 179),
                has_destination=False,
            )
        )
        is None
    )


CLOSED = LivenessReport(closed_at=NOW - 0.5)
DEAD = LivenessReport(closed_at=NOW - 0.5, proof="its container is gone")
COUNTED_ON = [Health.READY, Health.SUSPECT, Health.UNKNOWN, Health.JOINING, Health.QUARANTINED]


@pytest.mark.parametrize("health", COUNTED_ON)
@pytest.mark.parametrize("brake", [OFF, ON])
def test_a_proof_of_death_counts_at_once_and_in_a_brake_too(health: Health, brake: Brake) -> None:
    assert judge(evidence(health, 3.0, brake=brake, liveness=DEAD)) == Verdict(Health.DOWN, DEAD.proof)


@pytest.mark.parametrize("health", COUNTED_ON)
def test_a_worker_with_a_heartbeat_since_the_end_of_its_liveness_connection_is_not_dead(health: Health) -> None:
    assert verdict(health, 0.4, liveness=DEAD) is not Health.DOWN
    assert verdict(health, 0.5, liveness=DEAD) is Health.DOWN, "a heartbeat at the same instant counts as earlier"


def test_a_manager_that_was_away_can_prove_a_death_before_any_heartbeat() -> None:
    assert verdict(Health.UNKNOWN, liveness=DEAD, **NOT_HEARD_YET) is Health.DOWN


def test_a_worker_that_said_goodbye_is_not_proved_dead_but_has_time_for_a_restart() -> None:
    exiting = {"lease": {"exiting_at": NOW - 1.0}}
    assert verdict(Health.READY, 3.0, liveness=DEAD, **exiting) is None
    assert verdict(Health.READY, 3.0, liveness=CLOSED, **exiting) is None


def test_the_end_of_a_liveness_connection_makes_a_worker_suspect_until_a_heartbeat_or_a_new_one() -> None:
    assert judge(evidence(Health.READY, 3.0, liveness=CLOSED)) == Verdict(Health.SUSPECT, LIVENESS_ENDED)
    assert verdict(Health.SUSPECT, 3.0, liveness=CLOSED) is None
    assert verdict(Health.SUSPECT, 0.1, liveness=CLOSED) is Health.READY
    assert verdict(Health.SUSPECT, 3.0, liveness=LivenessReport()) is Health.READY


def test_suspicion_by_a_lost_liveness_connection_is_no_loss_but_its_consequences_are() -> None:
    ready, suspect = new_worker(health=Health.READY), new_worker(health=Health.SUSPECT)
    by_liveness, by_silence = replace(suspect, explanation=LIVENESS_ENDED), replace(suspect, explanation="no heartbeat")
    assert not Verdict(Health.SUSPECT, LIVENESS_ENDED).is_loss(ready)
    assert not Verdict(Health.READY, "").is_loss(by_liveness)
    assert Verdict(Health.SUSPECT, "no heartbeat").is_loss(ready)
    assert Verdict(Health.JOINING, "").is_loss(by_liveness)
    assert Verdict(Health.DOWN, DEAD.proof).is_loss(by_liveness)
    assert not Verdict(Health.DOWN, "").is_loss(by_silence), "the loss was counted when it fell silent"
