"""The agent's decisions about replies: pure functions."""

from __future__ import annotations

from typing import Any

import pytest
from orion_worker.agent.decisions import (
    Answer,
    Next,
    RentalAction,
    actions_for,
    after_heartbeat,
    after_register,
    agent_session_from,
    backoff_s,
    interval_from,
    placements_from,
    stop_grace_s,
)

REGISTRATION: dict[str, Any] = {
    "worker_id": "w-abcdefgh",
    "worker_token": "orion_worker_w-abcdefgh_x",
    "session_id": "0123456789",
    "heartbeat_interval_s": 30,
    "lease_s": 75.0,
    "door_answer_s": 5.0,
    "authorized_keys": ["ssh-ed25519 AAAA"],
    "placements": [],
    "a_field_of_a_newer_manager": True,
}


def item(state: str = "locked", epoch: int = 2) -> dict[str, Any]:
    return {"rental_id": "one", "username": "r-one", "uid": 100_001, "epoch": epoch, "state": state}


def want(what: str, epoch: int = 2, rental_id: str = "one") -> dict[str, Any]:
    return {"rental_id": rental_id, "epoch": epoch, "want": what}


@pytest.mark.parametrize(
    ("status", "code", "with_own_token", "expected"),
    [
        (201, "", True, Next.ACKNOWLEDGED),
        (201, "", False, Next.ACKNOWLEDGED),
        (401, "unauthorized", True, Next.FORGET),
        (401, "unauthorized", False, Next.RETRY),
        (409, "host_key_changed", True, Next.FORGET),
        (409, "host_key_changed", False, Next.RETRY),
        (409, "address_in_use", True, Next.RETRY),
        (200, "", True, Next.RETRY),
        (429, "rate_limited", True, Next.RETRY),
        (502, "manager_unreachable", True, Next.RETRY),
        (0, "", False, Next.RETRY),
    ],
)
def test_an_identity_is_given_up_only_when_the_manager_refuses_it(
    status: int, code: str, with_own_token: bool, expected: Next
) -> None:
    assert after_register(Answer(status=status, body={"code": code}), with_own_token) is expected


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (200, "", Next.ACKNOWLEDGED),
        (201, "", Next.RETRY),
        (401, "unauthorized", Next.REGISTER),
        (409, "stale_session", Next.REGISTER),
        (409, "something_else", Next.RETRY),
        (403, "forbidden", Next.RETRY),
        (429, "rate_limited", Next.RETRY),
        (500, "", Next.RETRY),
        (0, "", Next.RETRY),
    ],
)
def test_only_a_200_renews_and_only_a_refused_session_registers_again(status: int, code: str, expected: Next) -> None:
    assert after_heartbeat(Answer(status=status, body={"code": code})) is expected


def test_waiting_doubles_to_its_longest_and_is_spread_over_all_of_it() -> None:
    assert [backoff_s(attempt, 30.0, 1.0) for attempt in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]
    assert backoff_s(4, 30.0, 0.0) == 0.0
    assert backoff_s(4, 30.0, 0.25) == 2.0
    assert backoff_s(10**6, 30.0, 1.0) == 30.0


def test_waiting_is_never_shorter_than_the_server_asked_for() -> None:
    assert backoff_s(1, 30.0, 0.5, at_least_s=7.0) == 7.0


def test_a_rental_is_unlocked_only_at_the_epoch_that_is_to_run() -> None:
    assert actions_for([item("locked")], [want("run")]) == [RentalAction("unlock", "one", 2)]
    assert actions_for([item("locked")], [want("run", epoch=1)]) == []
    assert actions_for([item("locked")], [want("run", epoch=3)]) == []


def test_an_order_to_run_a_newer_epoch_locks_the_stale_one() -> None:
    assert actions_for([item("running")], [want("run", epoch=3)]) == [RentalAction("lock", "one", 2)]


@pytest.mark.parametrize("what", ["hold", "purge"])
def test_orders_to_hold_and_purge_lock_their_epoch_and_no_newer_one(what: str) -> None:
    assert actions_for([item("running")], [want(what)]) == [RentalAction("lock", "one", 2)]
    assert actions_for([item("running")], [want(what, epoch=1)]) == []
    assert actions_for([item("locked")], [want(what)]) == []


def test_a_rental_that_the_reply_does_not_name_is_left_as_it_is() -> None:
    assert actions_for([item("running")], []) == []
    assert actions_for([item("running")], [want("purge", rental_id="other")]) == []
    assert actions_for([], [want("run")]) == []


def test_the_newest_of_two_orders_for_one_rental_counts_in_any_order() -> None:
    both = [want("purge", epoch=1), want("run", epoch=2)]
    for placements in (both, both[::-1]):
        assert actions_for([item("locked")], placements) == [RentalAction("unlock", "one", 2)]
        assert actions_for([item("running")], placements) == []


def test_a_registration_is_read_and_fields_of_a_newer_manager_are_passed_over() -> None:
    session = agent_session_from(REGISTRATION)
    assert (session.worker_id, session.interval_s, session.lease_s) == ("w-abcdefgh", 30.0, 75.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"worker_token": None},
        {"worker_id": ""},
        {"session_id": 7},
        {"heartbeat_interval_s": "30"},
        {"authorized_keys": None},
        {"authorized_keys": ["ssh-ed25519 AAAA\ncommand=x ssh-ed25519 BBBB"]},
        {"placements": None},
        {"placements": [{"rental_id": "one", "epoch": 1, "want": "dance"}]},
    ],
)
def test_a_registration_reply_of_another_form_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        agent_session_from(REGISTRATION | wrong)
    with pytest.raises(ValueError, match="not a registration"):
        agent_session_from({key: value for key, value in REGISTRATION.items() if key not in wrong})


@pytest.mark.parametrize("value", [0, -1, 0.001, float("inf"), float("nan"), 10**6, None, "30", True])
def test_an_interval_that_would_spin_or_stop_the_agent_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="interval"):
        interval_from(value)


@pytest.mark.parametrize(
    "value", [{}, [1], [{"rental_id": "one"}], [{"rental_id": "one", "epoch": "1", "want": "run"}]]
)
def test_placements_of_another_form_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="placement"):
        placements_from(value)


def test_an_answer_is_described_in_one_line() -> None:
    assert str(Answer(status=0, reason="timed out")) == "no answer (timed out)"
    assert str(Answer(status=409, body={"code": "stale_session", "detail": "register again"})) == (
        "409 stale_session: register again"
    )
    assert str(Answer(status=502)) == "502"


def test_the_grace_of_a_stop_grows_with_the_files_that_have_to_migrate() -> None:
    """551 MB in 26,800 files were not carried within 55 s once, and came back from an old snapshot."""
    assert stop_grace_s(55, 590, files=0, size=0) == 55
    assert 300 < stop_grace_s(55, 590, files=26_800, size=551_000_000) < 590
    assert stop_grace_s(55, 590, files=10**6, size=10**12) == 590
    assert stop_grace_s(8, 8, files=26_800, size=551_000_000) == 8
