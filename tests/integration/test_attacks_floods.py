"""Floods of one kind of request through the real proxy to the real manager, while requests of other kinds still work.

Each flood is bounded in time and number, and comes from one address, as that of a single attacker.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import secrets
import socket
import ssl
import string
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from platform_support import Platform, raw
from support.builders import host_key

from orion.manager.api.event_streams import MAX_STREAMS_PER_TOKEN

FLOOD_S = 2.0
FLOODED_WITHIN_S = 60.0
"""Until the flood is one: a busy machine takes its time for the first answers."""
AT_ONCE = 8
IN_A_ROW = 100
LAST = b"GET /.well-known/proxy HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HEADER_TIMEOUT_S = 10.0
"""client_header_timeout and client_body_timeout of manager_proxy/limits.conf."""


def made_up_token(role: str) -> str:
    return f"orion_{role}_x_{''.join(secrets.choice(string.ascii_letters) for _ in range(43))}"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def written(method: str, path: str, role: str = "", body: dict[str, Any] | None = None) -> bytes:
    """Return a request with a well-formed token, which is new each time."""
    content = json.dumps(body).encode() if body is not None else b""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {made_up_token(role)}"] if role else []
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


@dataclass(frozen=True)
class Flood:
    request: Callable[[], bytes]
    answer: int = 429
    """One that it must get, unless this machine is too busy to ask so fast."""
    rate: float = 0.0
    burst: int = 0
    """The limit of an address by manager_proxy/routes.conf, in requests a second; 0: no limit."""

    def allows(self, seconds: float) -> float:
        return self.burst + self.rate * seconds


BEAT = {"session_id": "a" * 32, "seq": 1}
FLOODS = {
    "registrations": Flood(lambda: written("POST", "/api/register", "join", {}), 429, 5, 50),
    "heartbeats, each with another token": Flood(
        lambda: written("POST", "/api/heartbeat", "worker", BEAT), 429, 100, 300
    ),
    "rents, each with another token": Flood(lambda: written("POST", "/api/rent", "client", {}), 429, 200, 800),
    "lists, each with another token": Flood(lambda: written("GET", "/api/rentals", "client"), 429, 400, 1600),
    "health checks": Flood(lambda: written("GET", "/healthz"), 429, 100, 400),
    "what is not there": Flood(lambda: written("GET", "/wp-login.php"), 404),
}


async def honest_calls(attacked: Platform, token: str) -> dict[str, int]:
    """Make one call of each kind as an honest client; the worker's heartbeats continue meanwhile."""
    async with httpx.AsyncClient(base_url=attacked.url, trust_env=False, timeout=60) as http:
        rented = await http.post("/api/rent", json={"ssh_public_key": host_key(3)}, headers=bearer(token))
        place = f"/api/rentals/{rented.json()['id']}"
        return {
            "rent": rented.status_code,
            "show": (await http.get(place, headers=bearer(token))).status_code,
            "renew": (await http.post(f"{place}/renew", json={"ttl_s": 60}, headers=bearer(token))).status_code,
            "release": (await http.delete(f"{place}?wait_s=50", headers=bearer(token))).status_code,
        }


HONEST = {"rent": 201, "show": 200, "renew": 200, "release": 200}


@asynccontextmanager
async def flooding(attacked: Platform, request: Callable[[], bytes]) -> AsyncIterator[Counter[int]]:
    """Send requests as fast as possible, many at a time on each connection, until the block ends."""
    answers: Counter[int] = Counter()
    begun = asyncio.Event()

    async def attacker() -> None:
        while True:
            requests = b"".join(request() for _ in range(IN_A_ROW))
            received = await raw(attacked.proxy.http_port, requests + LAST, within_s=20)
            *flood, _last = re.findall(rb"HTTP/1\.1 (\d{3}) ", received) or [b""]
            answers.update(map(int, flood))
            if sum(answers.values()) > IN_A_ROW:
                begun.set()

    attackers = [asyncio.create_task(attacker()) for _ in range(AT_ONCE)]
    try:
        async with asyncio.timeout(FLOODED_WITHIN_S):
            await begun.wait()
        yield answers
    finally:
        for task in attackers:
            task.cancel()
        ended = await asyncio.gather(*attackers, return_exceptions=True)
    broken = [end for end in ended if not isinstance(end, asyncio.CancelledError)]
    assert not broken, broken


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_of_one_kind_is_cut_and_every_other_kind_is_answered(attacked: Platform, kind: str) -> None:
    flood = FLOODS[kind]
    token = await asyncio.to_thread(attacked.token, f"honest-{list(FLOODS).index(kind)}")
    began = time.monotonic()
    async with flooding(attacked, flood.request) as answers:
        await asyncio.sleep(FLOOD_S)
        # Of rents and of other calls an address has a share, which the flooder has spent for its neighbours as well.
        if not kind.startswith(("rents", "lists")):
            assert await honest_calls(attacked, token) == HONEST
    took_s = time.monotonic() - began
    assert await asyncio.to_thread(attacked.worker_health) == "ready"
    let_through = sum(number for status, number in answers.items() if status != 429)
    if flood.rate:
        assert let_through <= flood.allows(took_s) + AT_ONCE
    if sum(answers.values()) > 2 * flood.allows(took_s):
        assert answers[flood.answer], answers
    assert not [status for status in answers if status >= 500], answers


async def test_streams_of_events_of_one_token_are_limited_and_its_calls_still_work(attacked: Platform) -> None:
    token = await asyncio.to_thread(attacked.token, "streamer")
    open_ones = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=attacked.url, trust_env=False, timeout=60, limits=limits) as http:
        for _ in range(30):
            request = http.build_request("GET", "/api/events", headers=bearer(token) | {"Accept": "text/event-stream"})
            open_ones.append(await http.send(request, stream=True))
        refused = [reply for reply in open_ones if reply.status_code == 429]
        assert len(refused) == 30 - MAX_STREAMS_PER_TOKEN
        assert json.loads(await refused[0].aread())["code"] == "too_many_streams"
        assert await honest_calls(attacked, token) == HONEST
        for reply in open_ones:
            await reply.aclose()


async def test_a_flood_of_handshakes_does_not_disturb_others(attacked: Platform) -> None:
    token = await asyncio.to_thread(attacked.token, "patient")
    trusting_nobody = ssl.create_default_context()
    done = itertools.count(1)
    many = asyncio.Event()

    async def shake() -> None:
        while True:
            try:
                await asyncio.open_connection("127.0.0.1", attacked.proxy.https_port, ssl=trusting_nobody)
            except (ssl.SSLError, OSError):
                if next(done) > 20:
                    many.set()

    shaking = [asyncio.create_task(shake()) for _ in range(16)]
    await asyncio.sleep(FLOOD_S)
    async with asyncio.timeout(FLOODED_WITHIN_S):
        await many.wait()
    found = await honest_calls(attacked, token)
    for task in shaking:
        task.cancel()
    await asyncio.gather(*shaking, return_exceptions=True)
    assert found == HONEST


async def test_slow_clients_are_cut_and_delay_no_other_client(attacked: Platform) -> None:
    """Open 300 that never end their headers, 100 that never end their body, and 50 that never read their answer."""
    token = await asyncio.to_thread(attacked.token, "hasty")
    their = (await asyncio.to_thread(attacked.token, "deaf")).encode()
    port = attacked.proxy.http_port
    began = time.monotonic()
    head = b"GET /api/rentals HTTP/1.1\r\nHost: x\r\nX-Slow: "
    body = b"POST /api/rent HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nContent-Type: application/json\r\n\r\n{"
    greedy = b"GET /api/openapi.json HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + their + b"\r\n\r\n"
    drops = [b"x"] * 100
    slow = [asyncio.create_task(raw(port, head, *drops, pause_s=1, within_s=25)) for _ in range(300)]
    slow += [asyncio.create_task(raw(port, body, *drops[:12], pause_s=1, within_s=40)) for _ in range(100)]
    deaf = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    for connection in deaf:
        connection.sendall(greedy * 40)
    await asyncio.sleep(1)
    assert await honest_calls(attacked, token) == HONEST
    assert await asyncio.to_thread(attacked.worker_health) == "ready"
    answers = await asyncio.gather(*slow[:300])
    assert time.monotonic() - began >= HEADER_TIMEOUT_S
    assert all(answer == b"" or answer.startswith(b"HTTP/1.1 408 ") for answer in answers), set(answers)
    assert await honest_calls(attacked, token) == HONEST
    for task in slow[300:]:
        task.cancel()
    await asyncio.gather(*slow[300:], return_exceptions=True)
    for connection in deaf:
        connection.close()
