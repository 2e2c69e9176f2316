"""The leases: what renews and revokes them, and what a manager knows of them after its restart."""

from __future__ import annotations

import pytest

from orion.manager.domain.leases import Heartbeat, Lease, Leases
from orion.manager.domain.model import Item

WORKER = "w-1"
LEASE_S = 75.0
ITEM = Item(rental_id="rental1", username="r-rental1", uid=100_001, epoch=1)
OTHER = Item(rental_id="rental2", username="r-rental2", uid=100_002, epoch=4)


@pytest.fixture
def leases() -> Leases:
    table = Leases(LEASE_S)
    table.open(WORKER, "session-1", 10.0, [ITEM])
    return table


def renew(leases: Leases, seq: int = 0, now: float = 20.0, session: str = "session-1", exiting: bool = False) -> bool:
    return leases.renew(
        WORKER, Heartbeat(session_id=session, seq=seq, inventory=(ITEM,), exiting=exiting, lease_s=LEASE_S), now
    )


def test_a_registration_opens_a_lease_with_its_inventory(leases: Leases) -> None:
    assert leases.get(WORKER) == Lease(
        session_id="session-1", received_at=10.0, seq=-1, inventory=(ITEM,), lease_s=LEASE_S
    )
    assert leases.inventories([WORKER]) == {WORKER: (ITEM,)}
    assert leases.heard_at == 10.0


def test_a_heartbeat_of_the_session_renews_the_lease(leases: Leases) -> None:
    assert renew(leases, 7)
    assert leases.get(WORKER) == Lease(
        session_id="session-1", received_at=20.0, seq=7, inventory=(ITEM,), lease_s=LEASE_S
    )
    assert leases.heard_at == 20.0


def test_a_heartbeat_of_another_session_renews_nothing(leases: Leases) -> None:
    before = leases.get(WORKER)
    assert not renew(leases, session="session-0")
    assert leases.get(WORKER) == before
    assert leases.heard_at == 10.0


def test_a_heartbeat_of_an_unknown_worker_renews_nothing() -> None:
    leases = Leases(LEASE_S)
    assert not renew(leases)
    assert leases.get(WORKER) is None


@pytest.mark.parametrize("late", [3, 5])
def test_a_heartbeat_that_was_overtaken_renews_nothing(leases: Leases, late: int) -> None:
    assert renew(leases, 5)
    assert not renew(leases, late, now=30.0)
    assert leases.get(WORKER) == Lease(
        session_id="session-1", received_at=20.0, seq=5, inventory=(ITEM,), lease_s=LEASE_S
    )
    assert renew(leases, 6, now=31.0)


def test_a_new_registration_ends_the_session_before(leases: Leases) -> None:
    renew(leases, 5, exiting=True)
    leases.open(WORKER, "session-2", 30.0, [])
    assert not renew(leases, 6)
    assert renew(leases, 0, session="session-2")
    assert leases.exiting() == frozenset()


def test_a_revoked_session_is_not_renewed_any_more(leases: Leases) -> None:
    assert leases.revoke(WORKER, leases.get(WORKER))
    assert not renew(leases, 1)
    assert leases.inventories([WORKER]) == {}


def test_a_session_with_a_heartbeat_since_the_observation_is_not_revoked(leases: Leases) -> None:
    seen = leases.get(WORKER)
    renew(leases, 1)
    assert not leases.revoke(WORKER, seen)
    assert renew(leases, 2)


def test_a_session_that_began_since_the_observation_is_not_revoked(leases: Leases) -> None:
    assert leases.revoke(WORKER, leases.get(WORKER))
    leases.open(WORKER, "session-2", 30.0, [])
    assert not leases.revoke(WORKER, None)
    assert renew(leases, 0, session="session-2")


def test_after_a_restart_sessions_are_known_but_silent() -> None:
    leases = Leases(LEASE_S)
    leases.restore({WORKER: "session-1"}, 0.0)
    assert leases.get(WORKER) == Lease(session_id="session-1", lease_s=LEASE_S)
    assert leases.heard_at is None
    assert leases.inventories([WORKER]) == {}, "an unknown inventory is not taken for an empty one"


@pytest.mark.parametrize("seq", [0, 1, 900])
def test_after_a_restart_any_number_of_a_known_session_is_taken(seq: int) -> None:
    leases = Leases(LEASE_S)
    leases.restore({WORKER: "session-1"}, 0.0)
    assert renew(leases, seq)


def test_restored_sessions_do_not_replace_the_session_of_a_worker_that_has_registered(leases: Leases) -> None:
    leases.restore({WORKER: "session-0"}, 0.0)
    assert leases.get(WORKER) == Lease(
        session_id="session-1", received_at=10.0, seq=-1, inventory=(ITEM,), lease_s=LEASE_S
    )


def test_until_a_worker_reports_its_lease_it_is_assumed_to_have_the_longest_one_ever_given() -> None:
    leases = Leases(LEASE_S)
    leases.restore({WORKER: "session-1"}, 10 * LEASE_S)
    assert leases.get(WORKER).lease_s == 10 * LEASE_S
    leases.open("w-2", "session-2", 5.0, [])
    assert leases.get("w-2").lease_s == 10 * LEASE_S, (
        "the reply to its registration may be lost: then it runs by the old lease"
    )
    assert renew(leases)
    assert leases.get(WORKER).lease_s == LEASE_S


def test_a_worker_that_reports_a_longer_lease_than_was_ever_given_gets_no_more_grace(leases: Leases) -> None:
    assert leases.renew(WORKER, Heartbeat(session_id="session-1", seq=1, inventory=(ITEM,), lease_s=86_400.0), 20.0)
    assert leases.get(WORKER).lease_s == LEASE_S


def test_a_goodbye_counts_from_when_it_was_first_said(leases: Leases) -> None:
    renew(leases, 1, 20.0, exiting=True)
    renew(leases, 2, 25.0, exiting=True)
    assert leases.exiting() == {WORKER}
    assert leases.get(WORKER).exiting_at == 20.0


def test_a_heartbeat_after_the_goodbye_revokes_the_goodbye(leases: Leases) -> None:
    renew(leases, 1, exiting=True)
    renew(leases, 2, now=25.0)
    assert leases.exiting() == frozenset()


def test_a_purged_rental_is_removed_from_the_known_inventory(leases: Leases) -> None:
    leases.renew(WORKER, Heartbeat(session_id="session-1", seq=1, inventory=(ITEM, OTHER)), 20.0)
    leases.cleaned(WORKER, OTHER.rental_id, OTHER.epoch + 1)
    assert leases.inventories([WORKER]) == {WORKER: (ITEM, OTHER)}
    leases.cleaned(WORKER, OTHER.rental_id, OTHER.epoch)
    assert leases.inventories([WORKER]) == {WORKER: (ITEM,)}
    leases.cleaned("w-2", ITEM.rental_id, ITEM.epoch)


def test_losses_of_readiness_count_within_the_window_and_until_they_are_forgiven(leases: Leases) -> None:
    assert [leases.lost_ready(WORKER, at, 100.0) for at in (10.0, 50.0, 105.0)] == [1, 2, 3]
    assert leases.lost_ready(WORKER, 111.0, 100.0) == 3
    assert leases.losses(WORKER, 160.0, 100.0) == 2
    leases.forgive(WORKER)
    assert leases.losses(WORKER, 160.0, 100.0) == 0


def test_a_restart_that_was_announced_is_no_loss_and_the_next_silence_is_one(leases: Leases) -> None:
    leases.open(WORKER, "session-1", 1.0, ())
    leases.renew(WORKER, Heartbeat(session_id="session-1", seq=1, exiting=True), 2.0)
    leases.open(WORKER, "session-2", 4.0, ())
    assert leases.lost_ready(WORKER, 4.0, 100.0) == 0
    assert leases.lost_ready(WORKER, 50.0, 100.0) == 1


def test_an_unchanged_inventory_is_kept_as_the_same_object(leases: Leases) -> None:
    shown = leases.get(WORKER).inventory
    again = Item(rental_id=ITEM.rental_id, username=ITEM.username, uid=ITEM.uid, epoch=ITEM.epoch)
    assert leases.renew(WORKER, Heartbeat(session_id="session-1", seq=1, inventory=(again,)), 20.0)
    assert leases.get(WORKER).inventory is shown


def test_a_removed_worker_is_forgotten(leases: Leases) -> None:
    leases.lost_ready(WORKER, 10.0, 100.0)
    leases.end(WORKER)
    assert leases.get(WORKER) is None
    assert leases.losses(WORKER, 10.0, 100.0) == 0
    assert not renew(leases)


def test_the_newest_note_of_a_worker_is_taken_once_oldest_heartbeat_first(leases: Leases) -> None:
    leases.note(WORKER, 1.0, {"cpu": 1})
    leases.note("w-2", 1.5, {})
    leases.note(WORKER, 2.0, {"cpu": 2})
    assert leases.take_notes(1) == [(WORKER, 2.0, {"cpu": 2})], "the one that waits for longest comes first"
    assert leases.take_notes(10) == [("w-2", 1.5, {})]
    assert leases.take_notes(10) == []
