"""Tokens in the database: which are valid, and that only hashes are kept."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from orion.manager.store import tokens
from orion.manager.store import workers as worker_rows
from orion.manager.store.database import Store
from orion.manager.store.port import Registration
from orion.manager.store.schema import events, workers
from orion.manager.store.schema import tokens as table
from orion.manager.store.tokens import Principal, make_token

ALICE = ("admin", "alice", "client", None)
CLAIM = Registration(
    address="172.20.128.1",
    hostname="node-1",
    host_keys=("ssh-ed25519 AAAA",),
    slots=1,
    labels={},
    boot_id="boot-0001",
    agent_version="0.1",
)


NOW = 1_800_000_000.0


async def principal_of(store: Store, token: str, now: float = NOW) -> Principal | None:
    return await store.read(tokens.authenticate, token, now)


async def test_a_token_is_valid_for_the_principal_that_it_was_made_for(store: Store) -> None:
    row, token = await store.write(tokens.create, *ALICE)
    assert await principal_of(store, token) == Principal(role="client", id=row["id"], name="alice")


async def test_a_worker_s_token_is_valid_until_it_is_replaced_or_the_worker_is_removed(
    store: Store,
) -> None:
    made = await store.write(worker_rows.register, CLAIM, None, True)
    assert await principal_of(store, made.token) == Principal(role="worker", id=made.worker_id, name=made.worker_id)
    again = await store.write(worker_rows.register, CLAIM, made.worker_id, True)
    assert await principal_of(store, made.token) is None
    assert await principal_of(store, again.token) is not None
    await store.write(worker_rows.remove, "admin", made.worker_id)
    assert await principal_of(store, again.token) is None


async def test_a_text_that_is_no_token_is_refused(store: Store) -> None:
    row, token = await store.write(tokens.create, *ALICE)
    other = make_token("client", row["id"])
    wrong = ["", "x", token[:-1], token + "a", token.upper(), f" {token}", token + "\n", other]
    wrong += [
        token.replace("_client_", "_admin_"),
        token.replace(row["id"], "0000000000"),
        "orion_worker_w-1_" + "a" * 43,
    ]
    wrong += [f"orion_client_{row['id']}_{'é' * 43}"]
    assert [token for token in wrong if await principal_of(store, token) is not None] == []


async def test_an_expired_token_is_refused(store: Store) -> None:
    row, token = await store.write(tokens.create, "admin", "alice", "client", NOW + 60)
    principal = await principal_of(store, token, NOW + 59)
    assert principal is not None
    assert await store.read(tokens.is_valid, principal, NOW + 59)
    assert await principal_of(store, token, NOW + 60) is None
    assert not await store.read(tokens.is_valid, principal, NOW + 60)
    assert await store.read(tokens.named, "client", row["id"], NOW + 60) is None


async def test_a_revoked_token_is_refused_and_revoking_it_again_is_a_success(store: Store) -> None:
    row, token = await store.write(tokens.create, *ALICE)
    assert await store.write(tokens.revoke, "admin", row["id"])
    assert await store.write(tokens.revoke, "admin", row["id"])
    assert await principal_of(store, token) is None
    assert not await store.write(tokens.revoke, "admin", "no-such")


async def test_no_token_is_kept_only_its_hash(store: Store) -> None:
    _, token = await store.write(tokens.create, *ALICE)
    made = await store.write(worker_rows.register, CLAIM, None, True)
    tables = (table, workers, events)
    kept = await store.read(lambda c: [str(row) for each in tables for row in c.execute(select(each))])
    for secret in (token, made.token):
        assert not any(secret[-43:] in row for row in kept)


async def test_the_file_s_token_is_the_valid_one_also_after_the_file_was_made_again(store: Store) -> None:
    first, second = make_token("admin", "admin"), make_token("admin", "admin")
    await store.write(tokens.install, "admin", first)
    await store.write(tokens.install, "admin", first)
    assert await principal_of(store, first) == Principal(role="admin", id="admin", name="admin")
    await store.write(tokens.install, "admin", second)
    assert await principal_of(store, first) is None
    assert await principal_of(store, second) is not None
    assert await store.read(lambda c: len(c.execute(select(table)).all())) == 1


@pytest.mark.parametrize(
    "damaged",
    ["", "rubbish", make_token("join", "join"), make_token("admin", "admin")[:-1], "orion_admin_ADMIN_" + "a" * 43],
    # Named, because tests that run side by side must have the same names in every process.
    ids=["empty", "rubbish", "another role's", "cut short", "another name"],
)
async def test_a_damaged_file_is_refused_with_a_remedy(store: Store, damaged: str) -> None:
    with pytest.raises(ValueError, match="the admin token in its file is damaged: remove the file"):
        await store.write(tokens.install, "admin", damaged)


@pytest.mark.parametrize("role", ["admin", "client", "join", "worker"])
def test_a_token_that_was_made_is_well_formed(role: str) -> None:
    token = make_token(role, "some-id")
    assert tokens._TOKEN.fullmatch(token)
    assert token != make_token(role, "some-id")


async def test_a_revoked_token_stays_revoked_over_a_restart_until_its_file_is_made_again(store: Store) -> None:
    first, second = make_token("join", "join"), make_token("join", "join")
    await store.write(tokens.install, "join", first)
    await store.write(tokens.revoke, "admin", "join")
    await store.write(tokens.install, "join", first)
    assert await principal_of(store, first) is None
    await store.write(tokens.install, "join", second)
    assert await principal_of(store, second) == Principal(role="join", id="join", name="join")
    assert await principal_of(store, first) is None
