"""Rents in the database: one for each idempotency key, one living rental of a name, uids that are never reused."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from sqlalchemy import delete, select, update
from support.builders import host_key

from orion.manager.domain.states import RentalState
from orion.manager.store import events, rentals, state
from orion.manager.store.database import Store
from orion.manager.store.rentals import FIRST_UID, KEY_LIFETIME_S, NameTaken, NewRental, OtherRequest
from orion.manager.store.schema import rentals as table

REQUEST = NewRental(
    owner="alice",
    name=None,
    public_key=host_key(1),
    made_key=False,
    ttl_s=3600,
    labels={},
    key=None,
    request_hash="hash-1",
)
KEYED = replace(REQUEST, key="key-1")
NOW = 1_800_000_000.0


async def state_is(store: Store, rental_id: str, state: RentalState) -> None:
    await store.write(lambda c: c.execute(update(table).where(table.c.id == rental_id).values(state=state)).rowcount)


async def public_key_of(store: Store, rental_id: str) -> str:
    return (await store.read(rentals.one, rental_id, None))["public_key"]


async def test_a_new_rental_is_queued_with_an_event_and_a_name_that_people_can_say(store: Store) -> None:
    rental_id = await store.write(rentals.create, REQUEST)
    row = await store.read(rentals.one, rental_id, "alice")
    assert (row["state"], row["epoch"], row["uid"], row["username"]) == ("queued", 0, FIRST_UID, f"r-{rental_id}")
    assert row["name"].count("-") == 2
    assert row["worker_id"] is None
    (event,) = await store.read(events.page, "alice", rental_id, None, 0, 10)
    assert event["kind"] == "rental.queued"


async def test_a_uid_is_never_assigned_again_even_when_its_rental_is_removed(store: Store) -> None:
    first = await store.write(rentals.create, REQUEST)
    await store.write(lambda c: c.execute(delete(table).where(table.c.id == first)).rowcount)
    again = [await store.write(rentals.create, REQUEST) for _ in range(3)]
    uids = [(await store.read(rentals.one, rental_id, None))["uid"] for rental_id in again]
    assert uids == [FIRST_UID + 1, FIRST_UID + 2, FIRST_UID + 3]


async def test_rents_at_the_same_time_get_different_uids(store: Store) -> None:
    made = await asyncio.gather(*(store.write(rentals.create, REQUEST) for _ in range(20)))
    uids = await store.read(lambda c: set(c.execute(select(table.c.uid)).scalars()))
    assert len(set(made)) == len(uids) == 20


async def test_a_repeated_request_with_its_idempotency_key_makes_no_new_rental(store: Store) -> None:
    first = await store.write(rentals.create, KEYED)
    assert await store.write(rentals.create, KEYED) == first
    assert await store.read(lambda c: len(c.execute(select(table)).all())) == 1
    assert await store.read(events.last) == 1


async def test_the_same_request_many_times_at_once_makes_one_rental(store: Store) -> None:
    made = await asyncio.gather(*(store.write(rentals.create, KEYED) for _ in range(10)))
    assert len(set(made)) == 1


async def test_another_request_with_the_same_key_is_refused(store: Store) -> None:
    await store.write(rentals.create, KEYED)
    with pytest.raises(OtherRequest):
        await store.write(rentals.create, replace(KEYED, request_hash="hash-2"))


async def test_an_idempotency_key_belongs_to_its_owner(store: Store) -> None:
    first = await store.write(rentals.create, KEYED)
    assert await store.write(rentals.create, replace(KEYED, owner="bob", request_hash="hash-2")) != first


async def test_an_idempotency_key_is_forgotten_a_day_after_its_rent(store: Store) -> None:
    first = await store.write(rentals.create, replace(KEYED, key_begins_at=NOW))
    await store.write(rentals.forget_keys, NOW + KEY_LIFETIME_S)
    assert await store.write(rentals.create, KEYED) == first
    await store.write(rentals.forget_keys, NOW + KEY_LIFETIME_S + 1)
    assert await store.write(rentals.create, replace(KEYED, request_hash="hash-2")) != first


async def test_a_replay_returns_a_new_key_only_if_the_manager_made_it_and_the_rental_lives(store: Store) -> None:
    made = replace(KEYED, made_key=True)
    rental_id = await store.write(rentals.create, made)
    await store.write(rentals.create, replace(made, public_key=host_key(2)))
    assert await public_key_of(store, rental_id) == host_key(2)
    await store.write(rentals.create, replace(made, public_key=host_key(3), made_key=False))
    assert await public_key_of(store, rental_id) == host_key(2)
    await state_is(store, rental_id, RentalState.RELEASING)
    await store.write(rentals.create, replace(made, public_key=host_key(4)))
    assert await public_key_of(store, rental_id) == host_key(2)


async def test_a_request_that_was_refused_has_not_used_its_key(store: Store) -> None:
    await store.write(rentals.create, replace(REQUEST, name="lab"))
    with pytest.raises(NameTaken):
        await store.write(rentals.create, replace(KEYED, name="lab"))
    assert await store.write(rentals.create, KEYED)


@pytest.mark.parametrize("state", sorted(set(RentalState) - {"released", "expired", "failed"}))
async def test_the_name_of_a_living_rental_is_taken(store: Store, state: RentalState) -> None:
    await state_is(store, await store.write(rentals.create, replace(REQUEST, name="lab")), state)
    with pytest.raises(NameTaken):
        await store.write(rentals.create, replace(REQUEST, name="lab"))
    assert await store.write(rentals.create, replace(REQUEST, name="lab", owner="bob"))


@pytest.mark.parametrize("state", ["released", "expired", "failed"])
async def test_a_name_is_free_again_when_its_rental_has_ended(store: Store, state: RentalState) -> None:
    first = await store.write(rentals.create, replace(REQUEST, name="lab"))
    await state_is(store, first, state)
    assert await store.write(rentals.create, replace(REQUEST, name="lab")) != first


async def test_a_release_begins_once(store: Store) -> None:
    rental_id = await store.write(rentals.create, REQUEST)
    for _ in range(2):
        await store.write(rentals.begin_release, rental_id, "alice")
    assert (await store.read(state.load)).rentals[rental_id].end == "released"
    assert await store.read(events.last) == 2


async def test_a_rental_that_is_ending_is_not_renewed(store: Store) -> None:
    rental_id = await store.write(rentals.create, REQUEST)
    assert await store.write(rentals.extend, rental_id, "alice", 60, 0.0)
    await store.write(rentals.begin_release, rental_id, "alice")
    assert not await store.write(rentals.extend, rental_id, "alice", 60, 0.0)


async def test_another_owner_s_rental_is_as_unknown_as_one_that_never_was(store: Store) -> None:
    rental_id = await store.write(rentals.create, REQUEST)
    assert await store.read(rentals.one, rental_id, "bob") is None
    assert await store.read(rentals.one, "never", "alice") is None
    assert await store.read(rentals.page, "bob", None, True, None, 10) == []
