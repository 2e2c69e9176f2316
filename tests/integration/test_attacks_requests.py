"""Deceptive requests through the real proxy to the real manager."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from platform_support import Platform, raw
from support.builders import host_key
from support.http2 import Headers, data, exchange, headers, reset

KEY = host_key(3)
NAME = "/api/rentals/smuggled"


@pytest.fixture(scope="module")
def alice(attacked: Platform) -> Iterator[httpx.Client]:
    with attacked.client(attacked.token("alice")) as client:
        yield client


@pytest.fixture(scope="module")
def rental(alice: httpx.Client) -> dict[str, Any]:
    """Return the rental of Alice, which the attackers try to reach."""
    reply = alice.post("/api/rent", json={"name": "treasure", "ssh_public_key": KEY})
    assert reply.status_code == 201, reply.text
    return dict(reply.json())


def assert_problem(reply: httpx.Response, *statuses: int) -> dict[str, Any]:
    assert reply.status_code in statuses, f"{reply.status_code} {reply.text[:300]}"
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert problem["status"] == reply.status_code
    assert problem["code"]
    assert problem["detail"]
    return dict(problem)


# Authentication


def digits(token: str) -> str:
    """Return the token with its last character changed."""
    return token[:-1] + ("a" if token[-1] != "a" else "b")


STRANGE_CREDENTIALS = {
    "none": None,
    "empty": "",
    "no token": "Bearer",
    "another scheme": "Basic b3Jpb246b3Jpb24=",
    "very long": "Bearer " + "x" * 7000,
    "not ASCII": "Bearer orion_admin_admin_ÄÖÜ".encode(),
    "SQL": "Bearer orion_admin_' or 1=1 --_" + "a" * 43,
    "another's id": "Bearer orion_admin_admin_" + "a" * 43,
    "quoted": f'Bearer "orion_admin_admin_{"a" * 43}"',
    "a list": f"Bearer orion_admin_admin_{'a' * 43}, Bearer orion_admin_admin_{'b' * 43}",
}


@pytest.mark.parametrize("credentials", STRANGE_CREDENTIALS.values(), ids=STRANGE_CREDENTIALS)
def test_malformed_credentials_are_refused(attacked: Platform, credentials: str | bytes | None) -> None:
    headers = {} if credentials is None else {"Authorization": credentials}
    with httpx.Client(base_url=attacked.url, trust_env=False, timeout=60) as anonymous:
        for path in ("/api/rentals", "/api/workers", "/api/events", "/api/status"):
            assert assert_problem(anonymous.get(path, headers=headers), 401)["code"] == "unauthorized"
        assert_problem(anonymous.post("/api/rent", json={}, headers=headers), 401)


def test_a_token_is_accepted_only_in_its_header(attacked: Platform) -> None:
    token = attacked.secrets.admin_token
    with httpx.Client(
        base_url=attacked.url, trust_env=False, timeout=60, cookies={"Authorization": token}
    ) as anonymous:
        for name in ("token", "access_token", "authorization"):
            assert_problem(anonymous.get("/api/workers", params={name: token}), 401)
        assert_problem(anonymous.get("/api/workers", headers={"Proxy-Authorization": f"Bearer {token}"}), 401)
        assert_problem(anonymous.get("/api/workers", headers={"Authorization": f"Bearer {digits(token)}"}), 401)


async def test_two_authorization_headers_are_refused(attacked: Platform) -> None:
    token = attacked.secrets.admin_token.encode()
    answer = await raw(
        attacked.proxy.http_port,
        b"GET /api/workers HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Authorization: Bearer nothing\r\nAuthorization: Bearer " + token + b"\r\n\r\n",
        is_answered=True,
    )
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 401 "))


@pytest.mark.parametrize("role", ["client", "join", "worker", "nobody"])
def test_a_token_of_another_role_is_refused(attacked: Platform, rental: dict[str, Any], role: str) -> None:
    calls = [("GET", "/api/workers"), ("POST", "/api/tokens"), ("GET", "/api/admin/backup"), ("POST", "/api/heartbeat")]
    if role != "client":
        calls += [("GET", f"/api/rentals/{rental['id']}"), ("GET", "/api/events"), ("POST", "/api/rent")]
    token = attacked.token("mallory", role) if role in {"client", "join"} else f"orion_{role}_x_{'a' * 43}"
    with attacked.client(token) as mallory:
        for method, path in calls:
            assert_problem(mallory.request(method, path, json={}), 401, 403)


def test_a_rental_of_another_is_as_unknown_as_one_that_never_was(attacked: Platform, rental: dict[str, Any]) -> None:
    with attacked.client(attacked.token("eve")) as eve:
        for identity in (rental["id"], "abcdefghij"):
            place = f"/api/rentals/{identity}"
            replies = [eve.get(place), eve.delete(place), eve.post(f"{place}/renew", json={"ttl_s": 60})]
            replies.append(eve.get(f"{place}?state=active&wait_s=50"))
            bodies = [assert_problem(reply, 404) for reply in replies]
            assert {body["code"] for body in bodies} == {"not_found"}
            assert identity not in json.dumps(bodies)
        assert eve.get("/api/rentals").json()["items"] == []
        assert eve.get("/api/events", params={"rental_id": rental["id"]}).json()["items"] == []
    assert eve.is_closed


def test_a_revoked_or_expired_token_is_refused(attacked: Platform) -> None:
    with attacked.client() as admin:
        made = admin.post("/api/tokens", json={"name": "temp", "role": "client"}).json()
        with attacked.client(made["token"]) as temp:
            assert temp.get("/api/rentals").status_code == 200
            assert admin.delete(f"/api/tokens/{made['id']}").status_code == 204
            assert_problem(temp.get("/api/rentals"), 401)


# Bodies


def rent_with(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


DAMAGED = {
    "nothing": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "a string": b'"rent"',
    "a number": b"7",
    "null": b"null",
    "two objects": b"{}{}",
    "an unknown field": rent_with(admin=True),
    "a known field of another call": rent_with(epoch=7),
    "a deep list": b"[" * 100_000 + b"]" * 100_000,
    "a deep object": b'{"labels":' * 20_000 + b"{}" + b"}" * 20_000,
    "not UTF-8": b'{"name": "\xff\xfe"}',
    "NUL": b'{"name": "a\x00b"}',
    "NaN": b'{"ttl_s": NaN}',
    "infinity": b'{"ttl_s": Infinity}',
    "more than a float": b'{"wait_s": 1e400}',
    "a number of 5,000 digits": b'{"ttl_s": ' + b"9" * 5000 + b"}",
    "a fraction": rent_with(ttl_s=60.5),
    "a truth for a number": rent_with(ttl_s=True),
    "a list for a number": rent_with(ttl_s=[60]),
    "compressed": gzip.compress(b" " * 5_000_000 + b"{}"),
    "a form": b"name=a&ttl_s=60",
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
}


@pytest.mark.parametrize("body", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_body_is_refused(alice: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    if body.startswith(b"\x1f\x8b"):
        headers["Content-Encoding"] = "gzip"
    assert_problem(alice.post("/api/rent", content=body, headers=headers), 400, 422)


STRANGE_NAMES = [
    *("", " ", "-", "-rf", "a b", "a\nb", "a\tb", "../../etc", "a/b", "a\\b", "$(id)", "`id`", "a;id", "a|id", "a&id"),
    *("{{ 7*7 }}", "{% raw %}", "!!python/object/apply:os.system", "&a", "*a", "%00", "a\x00", "root", "Ä", "\uff41"),
    *("a\u202eb", "a\u200bb", "\ud800", "😀", "x" * 65, "x" * 100_000, "r-root", "~", ".", "..", "a'b", 'a"b', "a:b"),
]
ALLOWED = {"root", "r-root"}
"""The name of a rental is no account: an account's name is made from the id."""


@pytest.mark.parametrize("name", STRANGE_NAMES, ids=lambda name: ascii(name)[:30])
def test_a_dangerous_name_is_refused_with_the_name_of_its_field(alice: httpx.Client, name: str) -> None:
    reply = alice.post("/api/rent", content=rent_with(name=name, ssh_public_key=KEY), headers=JSON)
    if name in ALLOWED:
        assert reply.json()["username"] == f"r-{reply.json()['id']}"
        assert alice.delete(f"/api/rentals/{reply.json()['id']}").is_success
    else:
        assert assert_problem(reply, 422)["errors"][0]["field"] == "name"


JSON = {"Content-Type": "application/json"}
STRANGE_LABELS: list[Any] = [
    {"a": "$(reboot)"}, {"a": "{{ lookup('pipe','id') }}"}, {"a": "!!python/name:x"}, {"a": "<script>"}, {"a": "'; --"},
    {"a": "\ud800"}, {"\ud800": "a"}, {"a": "\x00"}, {"a": "x" * 10_000}, {"a": 7}, {"a": {"b": "c"}}, {"": "a"},
    {f"k{number}": "v" for number in range(1000)}, ["a"], {"x" * 300: "v"}, {"a": None}, {"__class__": "x" * 400},
]  # fmt: skip


@pytest.mark.parametrize("labels", STRANGE_LABELS, ids=lambda labels: ascii(labels)[:30])
def test_invalid_labels_are_refused_with_the_name_of_their_field(alice: httpx.Client, labels: Any) -> None:
    reply = alice.post("/api/rent", content=rent_with(labels=labels, ssh_public_key=KEY), headers=JSON)
    assert assert_problem(reply, 422)["errors"][0]["field"].startswith("labels")


def blob(kind: str, *parts: bytes) -> str:
    packed = b"".join(struct.pack(">I", len(part)) + part for part in (kind.encode(), *parts))
    return base64.b64encode(packed).decode()


GOOD_BLOB = KEY.split()[1]
STRANGE_KEYS = {
    "an option": f'command="id" {KEY}',
    "an environment": f'environment="LD_PRELOAD=/tmp/x" {KEY}',
    "from": f'from="*" {KEY}',
    "cert-authority": f"cert-authority {KEY}",
    "two keys": f"{KEY}\n{KEY}",
    "a line after": f"{KEY}\nssh-ed25519 AAAA",
    "a carriage return": f"{KEY}\rx",
    "a comment with a newline": f"{KEY} me\ncommand",
    "no blob": "ssh-ed25519",
    "a damaged blob": f"ssh-ed25519 {GOOD_BLOB[:-8]}",
    "not base64": "ssh-ed25519 !!!!!!!!!!!!!!!!!!!!!!!!!!!!",
    "DSA": f"ssh-dss {blob('ssh-dss', b'1' * 128, b'1' * 20, b'1' * 128, b'1' * 128)}",
    "a short RSA key": f"ssh-rsa {blob('ssh-rsa', bytes([1, 0, 1]), bytes([0]) + bytes([0xF1]) * 128)}",
    "an unknown kind": f"ssh-quantum {blob('ssh-quantum', b'1' * 32)}",
    "another kind than its blob": f"ssh-rsa {GOOD_BLOB}",
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----",
    "a certificate": f"ssh-ed25519-cert-v01@openssh.com {GOOD_BLOB}",
    "very long": f"ssh-rsa {'A' * 200_000}",
    "empty": "",
    "a shell": "$(id)",
    "a path": "/etc/passwd",
    "Jinja": "ssh-ed25519 {{ lookup('file','/etc/passwd') }}",
}


@pytest.mark.parametrize("key", STRANGE_KEYS.values(), ids=STRANGE_KEYS)
def test_only_a_single_plain_public_key_is_accepted(alice: httpx.Client, key: str) -> None:
    reply = alice.post("/api/rent", content=rent_with(ssh_public_key=key), headers=JSON)
    assert assert_problem(reply, 422)["errors"][0]["field"] == "ssh_public_key"


TIMES = [-1, 0, 1, 59, 30 * 86_400 + 1, 10**15, 2**63, 10**300, -(2**63), "60", "", None, "1 day", {}, 60.0000001]


@pytest.mark.parametrize("ttl_s", TIMES, ids=lambda value: repr(value)[:20])
def test_a_duration_out_of_bounds_is_refused_everywhere(
    alice: httpx.Client, attacked: Platform, rental: dict[str, Any], ttl_s: Any
) -> None:
    before = alice.get(f"/api/rentals/{rental['id']}").json()["expires_at"]
    assert_problem(alice.post("/api/rent", content=rent_with(ttl_s=ttl_s), headers=JSON), 422)
    renew = alice.post(f"/api/rentals/{rental['id']}/renew", content=rent_with(ttl_s=ttl_s), headers=JSON)
    assert_problem(renew, 422)
    assert alice.get(f"/api/rentals/{rental['id']}").json()["expires_at"] == before


@pytest.mark.parametrize("wait_s", [-1, 56, 1e308, "x", None], ids=repr)
def test_no_request_can_wait_longer_than_the_documented_maximum(
    alice: httpx.Client, rental: dict[str, Any], wait_s: Any
) -> None:
    assert_problem(alice.post("/api/rent", content=rent_with(wait_s=wait_s), headers=JSON), 422)
    if wait_s is not None:
        assert_problem(alice.get(f"/api/rentals/{rental['id']}?state=failed&wait_s={wait_s}"), 422)


# Idempotency keys


def test_a_replayed_key_with_another_body_is_a_conflict_and_with_the_same_body_the_same_rental(
    alice: httpx.Client,
) -> None:
    def ask(**body: Any) -> httpx.Response:
        return alice.post("/api/rent", json={"ssh_public_key": KEY} | body, headers={"Idempotency-Key": "once"})

    first = ask(ttl_s=3600)
    assert ask(ttl_s=3600).json()["id"] == first.json()["id"]
    assert assert_problem(ask(ttl_s=3601), 409)["code"] == "idempotency_conflict"
    assert alice.delete(f"/api/rentals/{first.json()['id']}").is_success


def test_many_replays_at_once_rent_one_environment(alice: httpx.Client) -> None:
    def ask(_: int) -> str:
        reply = alice.post("/api/rent", json={"ssh_public_key": KEY}, headers={"Idempotency-Key": "many"})
        return str(reply.json()["id"])

    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(ask, range(32)))
    assert len(found) == 1
    assert alice.delete(f"/api/rentals/{found.pop()}").is_success


def test_two_owners_may_use_the_same_idempotency_key(attacked: Platform, alice: httpx.Client) -> None:
    with attacked.client(attacked.token("zoe")) as zoe:
        rented = [
            client.post("/api/rent", json={"ssh_public_key": KEY}, headers={"Idempotency-Key": "shared"}).json()
            for client in (alice, zoe)
        ]
        assert rented[0]["id"] != rented[1]["id"]
        for client, made in zip((alice, zoe), rented, strict=True):
            assert client.delete(f"/api/rentals/{made['id']}").is_success


# Framing: one request in, one answer out, and nothing of it is ever taken for a second one


def framed(*headers: bytes, body: bytes, path: bytes = b"/api/rent", version: bytes = b"HTTP/1.1") -> bytes:
    lines = [b"POST " + path + b" " + version, b"Host: localhost", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"", body])


INNER = b"GET " + NAME.encode() + b" HTTP/1.1\r\nHost: localhost\r\nX: "
CHUNKED = b"0\r\n\r\n" + INNER
SMUGGLED = {
    "two lengths": framed(b"Content-Length: 0", b"Content-Length: %d" % len(INNER), body=INNER),
    "two lengths in one": framed(b"Content-Length: 0, %d" % len(INNER), body=INNER),
    "length and chunks": framed(b"Content-Length: %d" % len(CHUNKED), b"Transfer-Encoding: chunked", body=CHUNKED),
    "chunks and length": framed(b"Transfer-Encoding: chunked", b"Content-Length: 4", body=CHUNKED),
    "chunks twice": framed(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=CHUNKED),
    "chunks of a kind": framed(b"Transfer-Encoding: xchunked", body=CHUNKED),
    "chunks among others": framed(b"Transfer-Encoding: gzip, chunked", body=CHUNKED),
    "a space before the colon": framed(b"Transfer-Encoding : chunked", b"Content-Length: 4", body=CHUNKED),
    "a tab in the value": framed(b"Transfer-Encoding:\tchunked\x0b", b"Content-Length: 4", body=CHUNKED),
    "a folded header": framed(b"X: a\r\n Transfer-Encoding: chunked", b"Content-Length: 0, 9", body=CHUNKED),
    "a negative length": framed(b"Content-Length: -1", body=INNER),
    "a signed length": framed(b"Content-Length: +0", body=INNER),
    "a hexadecimal length": framed(b"Content-Length: 0x0", body=INNER),
    "an enormous length": framed(b"Content-Length: 99999999999999999999", body=INNER),
    "an enormous chunk": framed(b"Transfer-Encoding: chunked", body=b"FFFFFFFFFFFFFFFFF\r\n" + INNER),
    "a negative chunk": framed(b"Transfer-Encoding: chunked", body=b"-1\r\n" + INNER),
    "a NUL in a header": framed(b"X-A: a\0b", b"Content-Length: 0", body=INNER),
    "a header without a name": framed(b": a", b"Content-Length: 0, 1", body=INNER),
    "chunks in HTTP/1.0": framed(b"Transfer-Encoding: chunked", body=CHUNKED, version=b"HTTP/1.0"),
    "an unknown version": framed(b"Content-Length: 0", body=INNER, version=b"HTTP/3.7"),
    "two hosts": b"GET /api/rentals HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + INNER,
    "a second request in the address": b"GET /api/rentals HTTP/1.1\r\n\r\n" + INNER,
}


@pytest.mark.parametrize("request_bytes", SMUGGLED.values(), ids=SMUGGLED)
async def test_a_request_of_doubtful_length_is_refused_and_becomes_no_second_request(
    attacked: Platform, request_bytes: bytes
) -> None:
    answer = await raw(attacked.proxy.http_port, request_bytes, within_s=2, is_answered=True)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ", b"HTTP/1.1 501 ", b"HTTP/1.1 505 ")), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1, answer


WHOLE = b"GET " + NAME.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""A request that would be answered, and so be detected, wherever it is taken for one."""
BODY = b'{"ttl_s": 1}'
"""A body that the manager refuses with 422 once it has read all of it."""
IN_CHUNKS = b"Transfer-Encoding: chunked"
AS_A_WEBSOCKET = (b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13",
                  b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")  # fmt: skip
SSH = b"/api/rentals/abcdefgh23/ssh"


def chunk(content: bytes, more: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(content), more, content)


LAST = b"0\r\n\r\n"
AFTER_A_BODY: dict[str, tuple[bytes, list[int]]] = {
    "an extension of a chunk": (framed(IN_CHUNKS, body=chunk(BODY, b";a=b") + LAST), [401]),
    "a long extension": (framed(IN_CHUNKS, body=chunk(BODY, b";a=" + b"b" * 9000) + LAST), [401]),
    "a line end in an extension": (framed(IN_CHUNKS, body=b"2;\nxx\r\n" + WHOLE + LAST), [400]),
    "half a line end in an extension": (framed(IN_CHUNKS, body=b"2;a\rb\r\n{}\r\n" + LAST + WHOLE), [400]),
    "more than a chunk's size": (framed(IN_CHUNKS, body=b"2\r\n{}" + WHOLE + b"\r\n" + LAST), [400]),
    "no end of a chunk": (framed(IN_CHUNKS, body=b"2\r\n{}XX" + LAST + WHOLE), [400]),
    "a size with 0x": (framed(IN_CHUNKS, body=b"0x2\r\n{}\r\n" + LAST + WHOLE), [400]),
    "a size with a sign": (framed(IN_CHUNKS, body=b"+2\r\n{}\r\n" + LAST + WHOLE), [400]),
    "a size with an underscore": (framed(IN_CHUNKS, body=b"1_0\r\n" + BODY + LAST + WHOLE), [400]),
    "no size": (framed(IN_CHUNKS, body=b"\r\n" + WHOLE), [400]),
    "no size behind a good chunk": (framed(IN_CHUNKS, body=chunk(BODY) + b"zz\r\n" + WHOLE), [400]),
    "a size beyond all numbers": (framed(IN_CHUNKS, body=b"10000000000000002\r\n{}\r\n" + WHOLE), [400]),
    "a trailer": (framed(IN_CHUNKS, body=chunk(BODY) + b"0\r\nContent-Length: 99\r\n\r\n"), [401]),
    "a request for a trailer": (framed(IN_CHUNKS, body=chunk(BODY) + b"0\r\n" + WHOLE + b"\r\n"), [401]),
    "a trailer without an end": (framed(IN_CHUNKS, body=chunk(BODY) + b"0\r\nX: y\r\n"), [401]),
    "less than was announced": (framed(b"Content-Length: 999", body=BODY + WHOLE), [401]),
    "less than a chunk": (framed(IN_CHUNKS, body=b"fff\r\n" + WHOLE), [401]),
    "what waits to be asked": (framed(b"Expect: 100-continue", b"Content-Length: 12", body=BODY), [100, 401]),
    "chunks that wait to be asked": (framed(b"Expect: 100-continue", IN_CHUNKS, body=chunk(BODY) + LAST), [100, 401]),
    "what expects something else": (framed(b"Expect: 200-ok", b"Content-Length: 12", body=BODY), [401]),
    "a large body, unknown client": (framed(b"Content-Length: 99999", body=WHOLE * 400), [401]),
    "large chunks, unknown client": (framed(IN_CHUNKS, body=b"20000\r\n" + WHOLE * 400), [401]),
    "a body over the limit": (framed(b"Content-Length: 300000", body=WHOLE * 1000), [413]),
    "chunks over the limit": (framed(IN_CHUNKS, body=chunk(WHOLE * 200) * 40 + LAST), [413]),
    "a body where there is nothing": (framed(b"Content-Length: %d" % len(WHOLE), body=WHOLE, path=b"/none"), [404]),
    "a websocket with a body": (
        framed(*AS_A_WEBSOCKET, b"Content-Length: %d" % len(WHOLE), body=WHOLE, path=SSH).replace(b"POST", b"GET", 1),
        [400],
    ),
    "a websocket with chunks": (
        framed(*AS_A_WEBSOCKET, IN_CHUNKS, body=chunk(WHOLE) + LAST, path=SSH).replace(b"POST", b"GET", 1),
        [400],
    ),
    "another call as a websocket": (framed(*AS_A_WEBSOCKET, b"Content-Length: 12", body=BODY), [400]),
    "a websocket of another version": (
        b"GET " + SSH + b" HTTP/1.1\r\nHost: x\r\n" + b"\r\n".join(AS_A_WEBSOCKET).replace(b"13", b"12") + b"\r\n\r\n",
        [400, 426],
    ),
    "a header that only the proxy takes": (framed(b"Idempotency-Key: \xff\x01", b"Content-Length: 0", body=b""), [400]),
}  # fmt: skip
"""The sent bytes and the statuses that an unknown client gets; a known client gets 422 instead of 401."""
UNENDED = {"a trailer without an end", "less than was announced", "less than a chunk", "a large body, unknown client",
           "large chunks, unknown client"}  # fmt: skip
"""The rest of it is waited for, where a body of this size is taken from this caller."""


@pytest.mark.parametrize("sender", ["an unknown client", "a client"])
async def test_the_unread_rest_of_a_body_is_never_taken_for_a_request(attacked: Platform, sender: str) -> None:
    """Send bodies that the proxy forwards unbuffered, over connections that requests of others use next."""
    token = attacked.token("bodies").encode() if sender == "a client" else b""
    added = b"Authorization: Bearer " + token + b"\r\nHost:" if token else b"Host:"
    sent = [(name, expected, ends) for name, (_, expected) in AFTER_A_BODY.items() for ends in (False, True)]
    port = attacked.proxy.http_port
    tries = [
        raw(
            port,
            AFTER_A_BODY[name][0].replace(b"Host:", added, 1),
            within_s=2.5,
            ends=ends,
            is_answered=not ends and name not in UNENDED,
        )
        for name, _, ends in sent
    ]
    answers, _ = await asyncio.gather(asyncio.gather(*tries), honest_calls(attacked, 2.5))
    for (name, expected, ends), answer in zip(sent, answers, strict=True):
        statuses = [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
        allowed = {*expected} - {401} | {
            422 if token else 401
        }  # the manager may answer before the deceptive part arrives
        assert set(statuses) <= allowed, (name, answer)
        assert len(statuses) <= 1 + (100 in statuses), (name, answer)
        assert ends or statuses or name in UNENDED, (name, "there was no answer")
        assert b"through_the_door" not in answer, (name, "a request that the proxy did not write")
        is_problem = b"application/problem+json" in answer or name == "a websocket of another version"
        assert is_problem or set(statuses) <= {100}, (name, answer)


async def test_bytes_after_the_timeout_of_a_slow_body_are_never_taken_for_a_request(attacked: Platform) -> None:
    """Wait until the manager refuses a body after 15 s (408), when the proxy has forwarded a part of it."""
    port, whole = attacked.proxy.http_port, b"Authorization: Bearer " + attacked.token("late").encode()
    slow = [(framed(whole, b"Content-Length: 900", body=b" "), b" "), (framed(whole, IN_CHUNKS, body=b""), chunk(b" "))]
    tries = [given_up(port, begins, more) for begins, more in slow]
    answers, _ = await asyncio.gather(asyncio.gather(*tries), honest_calls(attacked, 15.5))
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 408 "), answer
        assert answer.count(b"HTTP/1.1 ") == 1, answer


async def given_up(port: int, begins: bytes, more: bytes) -> bytes:
    """Return all answers to a request with a slow body, and to the bytes that are sent after the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(begins)
    got = b""
    while not got:
        writer.write(more)
        with suppress(TimeoutError):
            got = await asyncio.wait_for(reader.read(65536), 2)
    with suppress(ConnectionError, TimeoutError):
        writer.write(WHOLE * 4)
        got += await asyncio.wait_for(reader.read(), 1)
    writer.close()
    return got


async def honest_calls(platform: Platform, for_s: float) -> None:
    """Make calls of another client over the same connections of the proxy; each must get its own answer."""
    paths = {"/api/rentals": (200, "items"), "/api/rentals/aaaaaaaa22": (404, "code"), "/api/status": (200, "brake")}
    last_moment = asyncio.get_running_loop().time() + for_s
    async with httpx.AsyncClient(base_url=platform.url, trust_env=False, timeout=60) as honest:
        honest.headers["Authorization"] = f"Bearer {platform.secrets.admin_token}"
        while asyncio.get_running_loop().time() < last_moment:
            replies = await asyncio.gather(*(honest.get(path) for path in paths for _ in range(4)))
            for reply in replies:
                status, field = paths[reply.request.url.path]
                assert (reply.status_code, field in reply.json()) == (status, True), reply.text
            await asyncio.sleep(0.25)  # the proxy allows a caller a hundred a second


def asked(path: str = "/api/rent", method: str = "POST", *more: tuple[str, str], host: str = "localhost") -> Headers:
    return [(":method", method), (":scheme", "https"), (":path", path), (":authority", host), *more]


def get(path: str = "/api/rentals", method: str = "GET", host: str = "localhost") -> list[bytes]:
    return [headers(asked(path, method, host=host), ends=True)]


def post(*more: tuple[str, str], body: bytes = BODY) -> list[bytes]:
    return [headers(asked("/api/rent", "POST", *more)), data(body)]


WEBSOCKET = [("upgrade", "websocket"), ("connection", "upgrade"), ("sec-websocket-version", "13"),
             ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")]  # fmt: skip
BY_HTTP_2: dict[str, tuple[list[bytes], set[bytes]]] = {
    "less than its data": (post(("content-length", "2"), body=BODY + WHOLE), {b"400"}),
    "more than its data": (post(("content-length", "200")), {b"400"}),
    "nothing, with data": (post(("content-length", "0"), body=WHOLE), {b"400"}),
    "a negative length": (post(("content-length", "-1"), body=WHOLE), {b"400"}),
    "two lengths": (post(("content-length", "12"), ("content-length", "0")), {b"400"}),
    "two lengths in one": (post(("content-length", "12, 0")), {b"400"}),
    "a length without data": ([headers(asked("/api/rent", "POST", ("content-length", "9")), ends=True)], {b"400"}),
    "chunks": (post(("transfer-encoding", "chunked"), body=LAST + WHOLE), {b"400", b"401"}),
    "chunks and a length": (post(("transfer-encoding", "chunked"), ("content-length", "5"), body=LAST), {b"400"}),
    "chunks in a value": (post(("x", "a\r\ntransfer-encoding: chunked"), body=LAST + WHOLE), {b"400"}),
    "a connection's header": (post(("connection", "keep-alive"), ("keep-alive", "1")), {b"400", b"401"}),
    "a name in capitals": (post(("Transfer-Encoding", "chunked"), body=LAST + WHOLE), {b"400"}),
    "a line end in a name": (post(("a\r\nx-orion-proxy-secret: y", "b")), {b"400"}),
    "a blank in a name": (post(("transfer-encoding ", "chunked"), body=LAST + WHOLE), {b"400"}),
    "a colon in a name": (post(("a: b", "c")), {b"400"}),
    "NUL in a name": (post(("a\0b", "c")), {b"400"}),
    "a line end in what is passed on": (post(("idempotency-key", "a\r\nx-orion-proxy-secret: b")), {b"400"}),
    "half a line end in what is passed on": (post(("user-agent", "a\nx: b")), {b"400"}),
    "NUL in what is passed on": (post(("idempotency-key", "a\0b")), {b"400"}),
    "what only the manager refuses": (post(("idempotency-key", "a\x0bb\x7f")), {b"400"}),
    "a request in the path": (get("/api/rentals HTTP/1.1\r\n\r\nGET " + NAME), {b"400"}),
    "a blank in the path": (get("/api/rentals HTTP/1.1"), {b"400"}),
    "an absolute path": (get("http://manager_app:5000/api/rentals"), {b"400"}),
    "a path without a slash": (get("api/rentals"), {b"400"}),
    "a star": (get("*", "OPTIONS"), {b"400"}),
    "two paths": ([headers(asked("/api/rentals", "GET", (":path", NAME)), ends=True)], {b"400"}),
    "a request in the method": (get(method=f"GET {NAME} HTTP/1.1\r\n\r\nGET"), {b"400"}),
    "a tunnel": (get(method="CONNECT"), {b"400", b"405"}),
    "a line end in the host": (get(host="a\r\nx-orion-proxy-secret: b"), {b"400"}),
    "a path in the host": (get(host="a b/c?d"), {b"400"}),
    "another host": ([headers(asked("/api/rentals", "GET", ("host", "other")), ends=True)], {b"400"}),
    "a line end in a cookie": ([headers(asked("/api/rentals", "GET", ("cookie", "a\r\nx: y")), ends=True)], {b"400"}),
    "a websocket with data": ([headers(asked(SSH.decode(), "GET", *WEBSOCKET)), data(WHOLE)], {b"400", b"401"}),
    "trailers": ([headers(asked()), data(BODY, ends=False), headers([("content-length", "0")], ends=True)], {b"401"}),
    "a path in a trailer": ([headers(asked()), data(BODY, ends=False), headers([(":path", NAME)], ends=True)], {b"401"}),  # noqa: E501
    "a body that is taken back": ([headers(asked()), data(WHOLE, ends=False), reset()], {b"401"}),
    "part of a length that is taken back": (
        [headers(asked("/api/rent", "POST", ("content-length", "999"))), data(WHOLE, ends=False), reset()],
        {b"401"},
    ),
    "data behind the end": ([*post(), data(WHOLE)], {b"401"}),
}  # fmt: skip


async def test_http_2_requests_that_http_1_cannot_express_become_no_other_request(attacked: Platform) -> None:
    port = attacked.proxy.https_port
    sent = [
        exchange(port, *frames, within_s=2.5, is_answered=b"401" not in expected)
        for frames, expected in BY_HTTP_2.values()
    ]
    answers, _ = await asyncio.gather(asyncio.gather(*sent), honest_calls(attacked, 2.5))
    for (name, (_, expected)), answer in zip(BY_HTTP_2.items(), answers, strict=True):
        assert len(answer) <= 1, (name, answer)
        assert {status for _, status, _ in answer} <= expected | {b"401"}, (name, answer)
        assert answer or b"401" in expected, (name, "there was no answer")
        assert b"through_the_door" not in b"".join(body for _, _, body in answer), name
        assert all(json.loads(body)["code"] for _, _, body in answer), name


async def test_the_log_of_the_proxy_has_no_smuggled_request(attacked: Platform) -> None:
    """Check each line of the proxy's log after all tests above."""
    asked = [line for line in await asyncio.to_thread(attacked.proxy.access_log) if "smuggled" in line["path"]]
    assert asked == []


PATHS = {
    "/api/../docs": 404,
    "/api/../../etc/passwd": 400,
    "/api/rentals/..%2f..%2ftokens": 404,
    "/api/rentals/%2e%2e/tokens": 404,
    "/api/rentals/../tokens": 404,
    "/api//tokens": 404,
    "//api/tokens": 404,
    "/api/tokens/": 404,
    "/api/tokens;x=1": 404,
    "/api/tokens%00": 400,
    "/api/tokens%0d%0aX-Orion-Proxy-Secret:%20x": 404,
    "/API/TOKENS": 404,
    "/api/%74okens": 200,
    "/api%2ftokens": 200,
    "http://manager_app:5000/api/tokens": 400,
    "http://elsewhere.example:5000/api/tokens": 200,
    "http://169.254.169.254/latest/meta-data": 404,
    "/\\evil.example/": 404,
}
"""As an administrator: 200 is the same call, by the same limits, written otherwise."""


@pytest.mark.parametrize(("path", "status"), PATHS.items(), ids=PATHS)
async def test_another_notation_of_a_path_reaches_no_other_resource(attacked: Platform, path: str, status: int) -> None:
    token = attacked.secrets.admin_token
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Authorization: Bearer {token}", "", ""]
    answer = await raw(attacked.proxy.http_port, "\r\n".join(lines).encode(), is_answered=True)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    if status == 200:
        assert b'"items"' in answer


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PUT", "PATCH", "PROPFIND", "OPTIONS", "X" * 200])
def test_an_undocumented_method_has_no_effect(alice: httpx.Client, rental: dict[str, Any], method: str) -> None:
    overriding = {"X-HTTP-Method-Override": "DELETE", "X-Method-Override": "DELETE"}
    reply = alice.request(method, f"/api/rentals/{rental['id']}", headers=overriding)
    assert_problem(reply, 400, 405)
    assert alice.get(f"/api/rentals/{rental['id']}").json()["state"] == "active"


def test_a_client_cannot_forge_the_headers_of_the_proxy(attacked: Platform, alice: httpx.Client) -> None:
    """Check that a registration with a forged address counts for the address of the sender."""
    forged = {
        "X-Real-IP": "10.0.0.9",
        "X-Forwarded-For": "10.0.0.9",
        "X-Orion-Proxy-Secret": "guess",
        "X-Request-ID": "mine",
    }
    reply = alice.get("/api/status", headers=forged)
    assert reply.status_code == 200
    assert reply.headers["x-request-id"] != "mine"
    body = {"hostname": "h", "ssh_host_keys": [host_key(9)], "slots": 1, "boot_id": "boot-0009", "agent_version": "1"}
    join = {"Authorization": f"Bearer {attacked.secrets.join_token}"} | forged
    with httpx.Client(base_url=attacked.url, trust_env=False, timeout=60) as unknown:
        # It is the address at which the honest worker answers: so it is in use.
        assert assert_problem(unknown.post("/api/register", json=body, headers=join), 409)["code"] == "address_in_use"


async def test_plain_http_is_not_upgraded_to_another_protocol(attacked: Platform) -> None:
    answer = await raw(
        attacked.proxy.http_port,
        b"GET /api/rentals HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
        within_s=2,
        is_answered=True,
    )
    assert answer.startswith(b"HTTP/1.1 401 ")
    old = await raw(attacked.proxy.http_port, b"GET /api/rentals\r\n", within_s=2)
    assert b"problem" not in old or b"401" in old or b"400" in old
    assert b"items" not in old
