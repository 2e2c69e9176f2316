"""Keys of a living rental, certificates for renters, and the line of known_hosts by which renters verify workers."""

from __future__ import annotations

from typing import Any

import asyncssh
import pytest
from support.builders import host_key
from support.harness import Harness

from orion import wire

MINE, OTHER = host_key(21), host_key(22)


def on_the_worker(harness: Harness, rental: dict[str, Any]) -> tuple[str, ...]:
    return harness.agent_of(rental).node.accounts[rental["id"]].keys


async def keys_of(harness: Harness, rental: dict[str, Any]) -> list[str]:
    listed = (await harness.as_admin.get(f"/api/rentals/{rental['id']}/keys")).json()["items"]
    return [item["public_key"] for item in listed]


async def test_a_key_is_added_to_a_living_rental_and_removed_again(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    path = f"/api/rentals/{rental['id']}/keys"
    reply = await harness.as_admin.post(path, json={"ssh_public_key": f"{OTHER} of a colleague", "wait_s": 0})
    assert reply.status_code == 202, reply.text
    assert [item["in_place"] for item in reply.json()["items"]] == [False, False]
    await harness.settle()
    assert on_the_worker(harness, rental) == (MINE, OTHER)
    again = await harness.as_admin.post(path, json={"ssh_public_key": OTHER, "wait_s": 0})
    assert (again.status_code, [item["in_place"] for item in again.json()["items"]]) == (201, [True, True])
    removed = await harness.as_admin.delete(f"{path}/{wire.key_id(MINE)}", params={"wait_s": 0})
    assert removed.status_code == 202
    await harness.settle()
    assert on_the_worker(harness, rental) == (OTHER,)
    assert [e["reason"] for e in await harness.events("rental.key_")][:1] == [wire.fingerprint(OTHER)]


async def comments_of(harness: Harness, rental: dict[str, Any]) -> list[str]:
    listed = (await harness.as_admin.get(f"/api/rentals/{rental['id']}/keys")).json()["items"]
    return [item["comment"] for item in listed]


async def test_the_comment_of_a_key_is_kept_for_people_and_goes_to_no_worker(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=f"{MINE} ada@desk")
    path = f"/api/rentals/{rental['id']}/keys"
    await harness.as_admin.post(path, json={"ssh_public_key": f"{OTHER} {'x' * 128}", "wait_s": 0})
    await harness.settle()
    assert await comments_of(harness, rental) == ["ada@desk", "x" * 100]
    assert await keys_of(harness, rental) == list(on_the_worker(harness, rental)) == [MINE, OTHER]
    for line, comment in ((f"{OTHER} bob's key", "bob's key"), (OTHER, "bob's key")):
        again = await harness.as_admin.post(path, json={"ssh_public_key": line, "wait_s": 0})
        assert (again.status_code, again.json()["items"][1]["comment"]) == (201, comment)
    await harness.as_admin.delete(f"{path}/{wire.key_id(OTHER)}", params={"wait_s": 0})
    await harness.as_admin.post(path, json={"ssh_public_key": OTHER, "wait_s": 0})
    assert await comments_of(harness, rental) == ["ada@desk", ""], "a comment is removed with its key"


@pytest.mark.parametrize("comment", ["a\x1b[2J", "a\tb", "a\nb", "a\x7f", "\u00e9", "x" * 129])
async def test_a_comment_that_is_no_short_printable_line_is_refused(harness: Harness, comment: str) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    body = {"ssh_public_key": f"{OTHER} {comment}", "wait_s": 0}
    assert (await harness.as_admin.post(f"/api/rentals/{rental['id']}/keys", json=body)).status_code == 422


async def test_a_repeated_request_is_the_same_whatever_its_key_is_called(harness: Harness) -> None:
    await harness.join()
    headers = {"Idempotency-Key": "once"}
    ids = set()
    for line in (f"{MINE} ada@desk", MINE, f"{MINE} another"):
        reply = await harness.as_admin.post("/api/rent", json={"wait_s": 0, "ssh_public_key": line}, headers=headers)
        ids.add(reply.json()["id"])
    assert len(ids) == 1
    assert await comments_of(harness, {"id": ids.pop()}) == ["ada@desk"]


async def test_the_last_key_stays(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    refused = await harness.as_admin.delete(f"/api/rentals/{rental['id']}/keys/{wire.key_id(MINE)}")
    assert (refused.status_code, refused.json()["code"]) == (409, "last_key")
    assert await keys_of(harness, rental) == [MINE]


async def test_keys_survive_a_takeover_and_those_removed_meanwhile_do_not_come_back(harness: Harness) -> None:
    await harness.join()
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    there = harness.agent_of(rental)
    path = f"/api/rentals/{rental['id']}/keys"
    await harness.as_admin.post(path, json={"ssh_public_key": OTHER, "wait_s": 0})
    await harness.settle()
    there.die()
    await harness.as_admin.delete(f"{path}/{wire.key_id(MINE)}", params={"wait_s": 0})
    await harness.silence(there, 100)
    await harness.pass_time(10)
    moved = await harness.rental(rental["id"])
    assert moved["worker_id"] != rental["worker_id"]
    assert on_the_worker(harness, moved) == (OTHER,)


async def test_a_worker_that_fails_gets_the_keys_when_it_does_not_any_more(harness: Harness) -> None:
    """A worker refuses the order while the rental is frozen, and gets it again after the thaw."""
    worker = await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    worker.node.failure = "it is frozen: thaw it"
    await harness.as_admin.post(f"/api/rentals/{rental['id']}/keys", json={"ssh_public_key": OTHER, "wait_s": 0})
    await harness.settle()
    assert on_the_worker(harness, rental) == (MINE,)
    worker.node.failure = ""
    await harness.pass_time(60)
    assert on_the_worker(harness, rental) == (MINE, OTHER)


@pytest.mark.parametrize("key", ["", "ssh-ed25519", f'command="x" {OTHER}', f"{OTHER}\n{MINE}", "ssh-rsa AAAA"])
async def test_an_added_key_is_refused_as_in_a_rent_if_it_is_not_one_plain_key(harness: Harness, key: str) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    for path in ("keys", "certificate"):
        refused = await harness.as_admin.post(f"/api/rentals/{rental['id']}/{path}", json={"ssh_public_key": key})
        assert refused.status_code == 422
    assert await keys_of(harness, rental) == [MINE]


async def test_the_number_of_keys_is_limited(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    path = f"/api/rentals/{rental['id']}/keys"
    for number in range(wire.MAX_KEYS):
        refused = await harness.as_admin.post(path, json={"ssh_public_key": host_key(100 + number), "wait_s": 0})
    assert (refused.status_code, refused.json()["code"]) == (409, "too_many_keys")
    assert len(await keys_of(harness, rental)) == wire.MAX_KEYS


async def test_a_rental_of_another_has_no_keys_and_no_certificates(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    mallory = await harness.new_client("mallory")
    path = f"/api/rentals/{rental['id']}"
    body = {"ssh_public_key": OTHER}
    for reply in (
        await mallory.get(f"{path}/keys"),
        await mallory.post(f"{path}/keys", json=body),
        await mallory.delete(f"{path}/keys/{wire.key_id(MINE)}"),
        await mallory.post(f"{path}/certificate", json=body),
    ):
        assert reply.status_code == 404
    assert await keys_of(harness, rental) == [MINE]


async def test_a_rental_that_ended_takes_no_keys_and_gives_no_certificates(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    path, body = f"/api/rentals/{rental['id']}", {"ssh_public_key": OTHER}
    assert (await harness.as_admin.post(f"{path}/keys", json=body)).json()["code"] == "ended"
    assert (await harness.as_admin.delete(f"{path}/keys/{wire.key_id(MINE)}")).json()["code"] == "ended"
    assert (await harness.as_admin.post(f"{path}/certificate", json=body)).json()["code"] == "not_active"


async def test_a_replay_that_makes_a_new_key_leaves_those_that_were_added(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    await harness.as_admin.post(f"/api/rentals/{rental['id']}/keys", json={"ssh_public_key": OTHER, "wait_s": 0})
    headers = {"Idempotency-Key": "once"}
    made = (await harness.as_admin.post("/api/rent", json={"wait_s": 0}, headers=headers)).json()
    path = f"/api/rentals/{made['id']}/keys"
    await harness.as_admin.post(path, json={"ssh_public_key": OTHER, "wait_s": 0})
    await harness.as_admin.post("/api/rent", json={"wait_s": 0}, headers=headers)
    found = await keys_of(harness, made)
    assert OTHER in found
    assert len(found) == 3


async def test_a_certificate_is_of_the_authority_of_users_for_this_rental_as_it_is_now(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    body = {"ssh_public_key": OTHER, "ttl_s": 600}
    reply = await harness.as_admin.post(f"/api/rentals/{rental['id']}/certificate", json=body)
    assert reply.status_code == 201, reply.text
    signed: Any = asyncssh.import_certificate(reply.json()["certificate"])
    assert signed.principals == [f"{rental['id']}-1"]
    assert str(signed.options["source-address"][0]).startswith("172.20.0.3")
    assert signed._valid_before == int(harness.clock.wall() + 600)
    signer = " ".join(signed.signing_key.export_public_key("openssh").decode().split()[:2])
    assert signer == harness.manager.authority.of_users
    [event] = await harness.events("rental.certificate_issued")
    assert event["details"] == {"fingerprint": wire.fingerprint(OTHER), "seconds": 600}


@pytest.mark.parametrize("ttl_s", [0, 59, 3601, -1, "600"])
async def test_a_certificate_lasts_an_hour_at_most(harness: Harness, ttl_s: Any) -> None:
    await harness.join()
    rental = await harness.rent(ssh_public_key=MINE)
    body = {"ssh_public_key": OTHER, "ttl_s": ttl_s}
    assert (await harness.as_admin.post(f"/api/rentals/{rental['id']}/certificate", json=body)).status_code == 422


async def test_the_line_for_known_hosts_covers_only_hosts_of_the_platform(harness: Harness) -> None:
    authority = (await (await harness.new_client("alice")).get("/api/ssh-authority")).json()
    assert authority["known_hosts"] == f"@cert-authority *.orion {harness.manager.authority.of_hosts}"
    assert (await harness.http.get("/api/ssh-authority")).status_code == 401


async def test_the_worker_gets_the_certificate_authority_with_the_keys(harness: Harness) -> None:
    jobs = []
    run = harness.manager.certificates.engine.run
    harness.manager.certificates.engine.run = lambda job: (jobs.append(job), run(job))[1]  # type: ignore[method-assign]
    await harness.join()
    await harness.rent()
    assert [job.order.user_authority for job in jobs] == [harness.manager.authority.of_users]
