"""Web ports: which requests the manager allows, where the proxy sends them, and the refusals of all others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_to_bytes

import httpx
import pytest
from orion_worker.web.port_tokens import PortToken, token_from
from orion_worker.web.refusals import PortRefusal
from support.harness import Agent, Harness

from orion import wire
from orion.manager.api.web_ports import WebPortServices
from orion.manager.gateway import port_connections, port_keys, tickets
from orion.manager.gateway.port_keys import PortKeys, TokenReference
from orion.manager.store.tokens import make_token

PORT = 8000
PATH_HOST, OWN_HOST = "orion.example:8443", "8000-it.apps.example"


class PortRequests:
    """Asks the manager as the proxy does for a request to a web port."""

    def __init__(self, harness: Harness, rental_id: str, port: int = PORT) -> None:
        self.harness = harness
        self.about = {"X-Orion-Rental": rental_id, "X-Orion-Port": str(port), "X-Orion-Method": "GET"}
        self.on_own_host = {"X-Orion-Own-Host": "1", "X-Forwarded-Host": OWN_HOST}

    async def send(self, **headers: str) -> httpx.Response:
        headers_of_proxy = self.about | {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.harness.http.get("/web/way", headers=headers_of_proxy)

    async def by_cookie(self, key: str, **headers: str) -> httpx.Response:
        return await self.send(**self.on_own_host, cookie=f"a=b; orion_port={key}; c=d", **headers)

    async def is_allowed(self, **headers: str) -> bool:
        reply = await self.send(**headers)
        assert reply.status_code in {204, 403}, reply.text
        if reply.status_code == 403:
            assert not {"x-orion-worker", "x-orion-pass"} & set(reply.headers), "a refusal names no worker"
        return reply.status_code == 204

    async def refusal(self, **headers: str) -> tuple[int, str]:
        reply = shown(await self.send(**headers))
        return reply.status_code, reply.json()["code"]


def shown(reply: httpx.Response) -> httpx.Response:
    """Return what the proxy makes of a refusal (manager_proxy/web_access.conf)."""
    assert (reply.status_code, reply.content) == (403, b"")
    headers = {
        name: reply.headers[name] for name in ("location", "www-authenticate", "retry-after") if name in reply.headers
    }
    kind = {"json": "application/problem+json", "html": "text/html; charset=utf-8"}[reply.headers["x-orion-refused-as"]]
    content = unquote_to_bytes(reply.headers["x-orion-refused-text"])
    return httpx.Response(
        int(reply.headers["x-orion-refused-status"]), headers=headers | {"Content-Type": kind}, content=content
    )


def token(client: httpx.AsyncClient) -> dict[str, str]:
    return {"Authorization": client.headers["Authorization"]}


async def ticket(client: httpx.AsyncClient, rental_id: str, port: int = PORT) -> str:
    reply = await client.post(f"/api/rentals/{rental_id}/ports/{port}/ticket")
    assert reply.status_code == 201, reply.text
    return str(reply.json()["ticket"])


async def send_form(harness: Harness, rental_id: str, ticket: str, port: int = PORT, **headers: str) -> httpx.Response:
    """Send the form of the page that `orion open` opens."""
    form = {"rental": rental_id, "port": str(port), "ticket": ticket}
    return await harness.http.post("/web/open", data=form, headers={n.replace("_", "-"): v for n, v in headers.items()})


async def key(harness: Harness, client: httpx.AsyncClient, rental_id: str, port: int = PORT) -> str:
    sent_on = await send_form(harness, rental_id, await ticket(client, rental_id, port), port)
    assert sent_on.status_code == 303, sent_on.text
    before, _, found = sent_on.headers["location"].rstrip("/").partition("~")
    assert before == f"/r/{rental_id}/{port}/"
    return str(found)


async def expose(client: httpx.AsyncClient, rental_id: str, public: bool = True, port: int = PORT) -> httpx.Response:
    return await client.put(f"/api/rentals/{rental_id}/ports/{port}", json={"public": public})


async def rented(harness: Harness) -> tuple[Agent, str, httpx.AsyncClient]:
    """Return a worker, the id of Alice's rental on it, and Alice's client."""
    worker, alice = await harness.join(), await harness.new_client("alice")
    rental_id = (await alice.post("/api/rent", json={"wait_s": 0})).json()["id"]
    await harness.settle()
    return worker, str(rental_id), alice


# Access


async def test_a_port_is_private_to_its_owner_except_while_it_is_public(harness: Harness) -> None:
    _, rental_id, alice = await rented(harness)
    mallory = await harness.new_client("mallory")
    port, other = PortRequests(harness, rental_id), PortRequests(harness, rental_id, 8001)
    assert not await port.is_allowed()
    assert not await port.is_allowed(**token(mallory))
    assert await port.is_allowed(**token(alice))
    assert await port.is_allowed(**token(harness.as_admin))

    assert (await expose(mallory, rental_id)).status_code == 404
    for _ in range(2):
        assert (await expose(alice, rental_id)).json()["public"] is True
    assert await port.is_allowed()
    assert await port.is_allowed(**token(mallory))
    assert not await other.is_allowed(), "only a port is public, and not the rental"
    listed = (await alice.get(f"/api/rentals/{rental_id}/ports")).json()["items"]
    assert [(item["port"], item["public"]) for item in listed] == [(PORT, True)]
    assert (await harness.rental(rental_id))["public_ports"] == [PORT]

    assert (await expose(alice, rental_id, public=False)).json()["public"] is False
    assert not await port.is_allowed()
    found = [(e["kind"], e["actor"], e["details"]) for e in await harness.events("rental.port")]
    assert found == [
        ("rental.port_published", "alice", {"port": PORT}),
        ("rental.port_closed", "alice", {"port": PORT}),
    ]


async def test_a_stranger_cannot_learn_which_rentals_exist(harness: Harness) -> None:
    _, rental_id, _ = await rented(harness)
    mallory = await harness.new_client("mallory")
    there, nowhere = PortRequests(harness, rental_id), PortRequests(harness, "nosuchthin")
    assert await there.refusal() == await nowhere.refusal() == (401, "private")
    assert await there.refusal(**token(mallory)) == await nowhere.refusal(**token(mallory)) == (404, "not_found")
    assert await there.refusal(Authorization="Bearer orion_client_x_y") == (401, "unauthorized")


async def test_a_rental_is_found_by_its_name_by_its_owner_alone(harness: Harness) -> None:
    await harness.join()
    alice, mallory = await harness.new_client("alice"), await harness.new_client("mallory")
    rental_id = (await alice.post("/api/rent", json={"name": "production", "wait_s": 0})).json()["id"]
    await harness.settle()
    named = PortRequests(harness, "production")
    sent_on = shown(await named.send(X_Orion_Rest="/a%2Fb?c=d", **token(alice)))
    assert (sent_on.status_code, sent_on.headers["location"]) == (307, f"/r/{rental_id}/{PORT}/a%2Fb?c=d")
    elsewhere = shown(await named.send(X_Orion_Rest="//evil.example/", **token(alice)))
    assert elsewhere.headers["location"].startswith(f"/r/{rental_id}/{PORT}/")
    assert await named.refusal(**token(mallory)) == await named.refusal(**token(harness.as_admin)) == (404, "not_found")
    stranger = shown(await named.send()).json()
    assert stranger["code"] == "private"
    assert f"`orion open production {PORT}`" in stranger["detail"]


@pytest.mark.parametrize(
    ("seen", "status", "code"),
    [
        ("", 503, "try_again"),
        ("not_connected", 503, "worker_unreachable"),
        ("no_answer", 503, "worker_unreachable"),
        ("unreadable", 502, "answer_unreadable"),
        ("what no proxy says", 503, "try_again"),
    ],
)
async def test_a_failure_of_the_proxy_is_explained_by_its_own_observation(
    harness: Harness, seen: str, status: int, code: str
) -> None:
    _, rental_id, alice = await rented(harness)
    reply = await PortRequests(harness, rental_id).send(X_Orion_Explain="1", X_Orion_Seen=seen, **token(alice))
    assert (reply.status_code, reply.json()["code"]) == (status, code)


async def test_only_the_proxy_can_request_access_to_a_port(harness: Harness) -> None:
    """Nginx forwards no request to this path, and the path needs the proxy secret."""
    _, rental_id, alice = await rented(harness)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(harness.app), base_url="http://manager") as outsider:
        reply = await outsider.get("/web/way", headers=PortRequests(harness, rental_id).about | token(alice))
    assert reply.json()["code"] == "not_through_the_door"
    assert "/web/way" not in (await harness.http.get("/api/openapi.json")).json()["paths"]


@pytest.mark.parametrize("port", ["22", "80", "1023", "65536", "0", "-1", "", "80 00", "8e3", "٨٠٠٠", "9" * 14])
async def test_an_invalid_port_number_is_not_found(harness: Harness, port: str) -> None:
    headers = PortRequests(harness, "abcdefghij").about | {"X-Orion-Port": port}
    reply = shown(await harness.http.get("/web/way", headers={name: value.encode() for name, value in headers.items()}))
    assert (reply.status_code, reply.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("port", ["22", "1023", "65536", "0", "-1", "8e3"])
async def test_only_a_port_of_a_renter_is_made_public(harness: Harness, port: str) -> None:
    refused = await harness.as_admin.put(f"/api/rentals/x/ports/{port}", json={"public": True})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")


async def test_the_number_of_public_ports_is_limited_and_an_ended_rental_has_none(harness: Harness) -> None:
    _, rental_id, alice = await rented(harness)
    for port in range(2000, 2000 + wire.MAX_PUBLIC_PORTS):
        assert (await expose(alice, rental_id, port=port)).status_code == 200
    refused = await expose(alice, rental_id)
    assert (refused.status_code, refused.json()["code"]) == (409, "too_many_ports")
    await alice.delete(f"/api/rentals/{rental_id}")
    await harness.settle()
    refused = await expose(alice, rental_id, public=False, port=2000)
    assert (refused.status_code, refused.json()["code"]) == (409, "ended")
    refused = await alice.post(f"/api/rentals/{rental_id}/ports/2000/ticket")
    assert (refused.status_code, refused.json()["code"]) == (409, "ended")


# The worker and the access token


def accepted_by(reply: httpx.Response, worker: Agent) -> PortToken | None:
    """Return the access token that the port proxy of that worker reads, or None if it refuses."""
    try:
        return token_from(reply.headers["x-orion-pass"], worker.session)
    except PortRefusal:
        return None


async def test_a_request_reaches_the_current_worker_with_an_access_token_for_that_worker_alone(
    harness: Harness,
) -> None:
    first, rental_id, alice = await rented(harness)
    second = await harness.join()
    requests = PortRequests(harness, rental_id)
    reply = await requests.send(**token(alice))
    assert reply.headers["x-orion-worker"] == first.node.host.address
    assert accepted_by(reply, first) == PortToken(rental_id=rental_id, epoch=1, port=PORT)
    assert accepted_by(reply, second) is None

    first.die()
    await harness.silence(first, 60)
    assert (await requests.send(**token(alice))).status_code == 204, "no worker is declared down for being silent"
    await harness.silence(first, 100)
    await harness.pass_time(10)
    moved = await requests.send(**token(alice))
    assert moved.headers["x-orion-worker"] == second.node.host.address
    assert accepted_by(moved, second) == PortToken(rental_id=rental_id, epoch=2, port=PORT)
    assert accepted_by(moved, first) is None


async def test_an_access_token_ends_with_the_session_of_its_worker(harness: Harness) -> None:
    """Another container gets a dead worker's address, or the worker registers again."""
    worker, rental_id, alice = await rented(harness)
    before = await PortRequests(harness, rental_id).send(**token(alice))
    await worker.register()
    await harness.settle()
    assert accepted_by(before, worker) is None
    assert accepted_by(await PortRequests(harness, rental_id).send(**token(alice)), worker) == PortToken(
        rental_id=rental_id, epoch=1, port=PORT
    )


async def test_a_port_of_a_migrating_rental_is_refused_with_a_wait(harness: Harness) -> None:
    worker, rental_id, alice = await rented(harness)
    await expose(alice, rental_id)
    await harness.join()
    await harness.rent()  # which takes the only other slot
    worker.die()
    await harness.silence(worker, 100)
    await harness.pass_time(10)
    assert (await harness.rental(rental_id))["state"] != "active"
    requests = PortRequests(harness, rental_id)
    assert not await requests.is_allowed()
    reply = shown(await requests.send())
    assert (reply.status_code, reply.json()["code"]) == (503, "not_active")
    assert reply.headers["retry-after"] == "2"
    assert "queued" not in reply.text, "the reason is only for its owner"
    await expose(alice, rental_id, public=False)
    assert "queued" in shown(await requests.send(**token(alice))).text


async def test_ports_of_an_ended_rental_are_refused_at_once_for_everybody(harness: Harness) -> None:
    _, rental_id, alice = await rented(harness)
    await expose(alice, rental_id)
    key_value = await key(harness, alice, rental_id)
    requests = PortRequests(harness, rental_id)
    await alice.delete(f"/api/rentals/{rental_id}")
    assert await requests.refusal() == (401, "private")
    assert await requests.refusal(**token(alice)) == (404, "ended")
    assert await requests.refusal(X_Orion_Key=key_value) == (404, "ended")


async def test_a_refusal_is_a_page_for_browsers_and_json_for_programs(harness: Harness) -> None:
    requests = PortRequests(harness, "abcdefghij")
    page = shown(await requests.send(Accept="text/html,*/*"))
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert f"orion open abcdefghij {PORT}" in page.text
    refusal = shown(await requests.send(Accept="*/*"))
    assert refusal.headers["content-type"] == "application/problem+json"
    assert refusal.headers["www-authenticate"].startswith("Bearer")


# Browsers


async def test_a_ticket_opens_one_port_once_within_a_minute(harness: Harness) -> None:
    _, rental_id, alice = await rented(harness)
    bought = await ticket(alice, rental_id)
    assert (await send_form(harness, rental_id, bought, 8001)).status_code == 401
    assert (await send_form(harness, rental_id, bought)).status_code == 401, "the attempt used the ticket up"
    late = await ticket(alice, rental_id)
    harness.clock.now += tickets.LIFETIME_S
    assert (await send_form(harness, rental_id, late)).status_code == 401
    good = await ticket(alice, rental_id)
    assert (await send_form(harness, rental_id, good)).status_code == 303
    assert (await send_form(harness, rental_id, good)).status_code == 401
    found = [(e["actor"], e["details"]) for e in await harness.events("rental.port_opened")]
    assert found == [("alice", {"port": PORT, "from": "198.51.100.7"})]


async def test_a_port_key_in_the_path_opens_only_its_port_for_eight_hours(harness: Harness) -> None:
    _, rental_id, alice = await rented(harness)
    key_value = await key(harness, alice, rental_id)
    requests = PortRequests(harness, rental_id)
    assert await requests.is_allowed(X_Orion_Key=key_value)
    assert not await PortRequests(harness, rental_id, 8001).is_allowed(X_Orion_Key=key_value)
    assert not await requests.is_allowed(cookie=f"orion_port={key_value}"), (
        "there are no cookies on the platform's own address"
    )
    await harness.restart()
    requests = PortRequests(harness, rental_id)
    assert await requests.is_allowed(X_Orion_Key=key_value), "a restart of the manager ends no access"
    harness.clock.wall_offset += 40 * 86_400
    assert await requests.is_allowed(X_Orion_Key=key_value), "this clock is not trusted"
    harness.clock.now += port_keys.LIFETIME_S
    assert not await requests.is_allowed(X_Orion_Key=key_value)


async def test_on_its_own_host_the_port_key_is_a_cookie_that_scripts_cannot_read(harness: Harness) -> None:
    _, rental_id, alice = await rented(harness)
    on_host = {"X_Orion_Own_Host": "1", "X_Orion_Rental": rental_id, "X_Orion_Port": str(PORT)}
    sent_on = await send_form(harness, rental_id, await ticket(alice, rental_id), **on_host, X_Forwarded_Proto="https")
    assert (sent_on.status_code, sent_on.headers["location"]) == (303, "/")
    name, _, rest = sent_on.headers["set-cookie"].partition("=")
    key_value, _, attributes = rest.partition("; ")
    assert name == "orion_port"
    assert attributes == "HttpOnly; Max-Age=28800; Path=/; SameSite=lax; Secure"
    requests = PortRequests(harness, rental_id)
    assert (await requests.by_cookie(key_value)).status_code == 204
    forged = await requests.send(**requests.on_own_host, cookie=f"orion_port=forged; orion_port={key_value}")
    assert forged.status_code == 204, "another host of the same site may have set a cookie that is no key"
    assert not await requests.is_allowed(**requests.on_own_host, X_Orion_Key=key_value)
    elsewhere = await send_form(
        harness, rental_id, await ticket(alice, rental_id), **on_host | {"X_Orion_Port": "8001"}
    )
    assert elsewhere.status_code == 422


async def test_a_port_key_is_valid_only_while_its_token_is(harness: Harness) -> None:
    _, rental_id, alice = await rented(harness)
    key_value = await key(harness, alice, rental_id)
    known = (await harness.as_admin.get("/api/tokens")).json()["items"]
    its_id = next(one["id"] for one in known if one["name"] == "alice")
    bought = await ticket(alice, rental_id)
    await harness.as_admin.delete(f"/api/tokens/{its_id}")
    assert not await PortRequests(harness, rental_id).is_allowed(X_Orion_Key=key_value)
    assert (await send_form(harness, rental_id, bought)).status_code == 401


async def test_no_ticket_is_given_for_another_owner_s_rental(harness: Harness) -> None:
    _, rental_id, _ = await rented(harness)
    mallory = await harness.new_client("mallory")
    assert (await mallory.post(f"/api/rentals/{rental_id}/ports/{PORT}/ticket")).status_code == 404


def test_only_signed_port_keys_are_accepted() -> None:
    keys, named = PortKeys("secret"), TokenReference(role="client", token_id="t-1", mark="0123456789abcdef")
    made = keys.make("abcdefghij", PORT, named, 1000.0)
    assert keys.read(made, "abcdefghij", PORT, 1000.0) == named
    signature, _, content = made.partition(".")
    assert PortKeys("another").read(made, "abcdefghij", PORT, 1000.0) is None
    for other in (
        f"{signature}.{content}0",
        f"{signature}.f{content}",
        f"{signature}.{content.replace('client', 'admin')}",
        "",
    ):
        assert keys.read(other, "abcdefghij", PORT, 1000.0) is None, other
    for rental_id, port in (("abcdefghi", PORT), ("abcdefghij", 8001), ("abcdefghij 8", 0)):
        assert keys.read(made, rental_id, port, 1000.0) is None
    assert keys.read(made, "abcdefghij", PORT, 1000.0 + port_keys.LIFETIME_S) is None


FROM_ELSEWHERE: list[dict[str, str]] = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://8000-other.apps.example"},
    {"Origin": f"http://{OWN_HOST}:81"},
    {"Origin": "http://[::"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "websocket", "Sec-Fetch-Dest": "websocket"},
    {
        "Sec-Fetch-Site": "same-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
        "X-Orion-Method": "POST",
    },
]


@pytest.mark.parametrize("headers", FROM_ELSEWHERE)
async def test_a_foreign_page_cannot_use_the_cookie_of_a_browser(harness: Harness, headers: dict[str, str]) -> None:
    _, rental_id, alice = await rented(harness)
    key_value = await key(harness, alice, rental_id)
    requests = PortRequests(harness, rental_id)
    assert shown(await requests.by_cookie(key_value, **headers)).json()["code"] == "cross_site"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": f"http://{OWN_HOST}", "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    ],
)
async def test_requests_of_the_own_page_and_of_links_are_allowed(harness: Harness, headers: dict[str, str]) -> None:
    _, rental_id, alice = await rented(harness)
    key_value = await key(harness, alice, rental_id)
    assert (await PortRequests(harness, rental_id).by_cookie(key_value, **headers)).status_code == 204


@pytest.mark.parametrize(
    ("domain", "host", "expected"),
    [
        ("", "localhost:8080", "8000-{}.localhost"),
        ("", "127.0.0.1", "8000-{}.localhost"),
        ("", "orion.example:8443", None),
        ("", "[::", None),
        ("apps.example", "orion.example", "8000-{}.apps.example"),
    ],
)
async def test_a_port_has_a_host_of_its_own_where_there_is_a_domain_or_the_browser_is_on_this_machine(
    harness: Harness, domain: str, host: str, expected: str | None
) -> None:
    _, rental_id, alice = await rented(harness)
    harness.change_services(WebPortServices, apps_domain=domain)
    alice.headers["X-Forwarded-Host"] = host
    port: dict[str, Any] = (await expose(alice, rental_id)).json()
    assert port["host"] == (expected.format(rental_id) if expected else None)
    assert port["path"] == f"/r/{rental_id}/8000/"


@pytest.mark.parametrize(
    "form", [{}, {"port": "x"}, {"port": "8000", "ticket": "x" * 2000}, {"rental": "a", "port": "8000"}]
)
async def test_an_invalid_form_is_refused(harness: Harness, form: dict[str, str]) -> None:
    reply = await harness.http.post("/web/open", data=form)
    assert reply.status_code in {401, 413, 422}
    assert reply.json()["code"] in {"no_ticket", "body_too_large", "invalid_request"}


# Connections end with the token that opened them


class FakePortProxies:
    """Fake port proxies of all workers: their open connections, the messages to them, and whether they answer."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.messages: list[tuple[str, tuple[str, ...]]] = []
        self.is_open: list[str] = []
        self.away = 0
        harness.manager.port_connections._end_connections = self.tell

    async def tell(self, address: str, session_id: str, number: int, over: Sequence[str]) -> list[str]:
        if self.away:
            self.away -= 1
            raise ConnectionRefusedError
        [agent] = [agent for agent in self.harness.agents if agent.node.host.address == address]
        assert session_id == agent.session
        self.messages.append((agent.worker_id, tuple(over)))
        self.is_open = [line for line in self.is_open if line not in over and f"* * {line.split()[2]}" not in over]
        return self.is_open

    async def all_messages(self) -> list[tuple[str, tuple[str, ...]]]:
        await asyncio.wait_for(asyncio.gather(*self.harness.manager.port_connections._running), 20)
        return self.messages


async def access_token_of(harness: Harness, agent: Agent, rental_id: str, **headers: str) -> PortToken:
    reply = await PortRequests(harness, rental_id).send(**headers)
    assert reply.status_code == 204, reply.text
    return token_from(reply.headers["x-orion-pass"], agent.session)


async def test_port_proxies_are_notified_when_a_token_is_revoked(harness: Harness) -> None:
    worker, rental_id, alice = await rented(harness)
    await harness.join()
    port_proxies = FakePortProxies(harness)
    passed_token = await access_token_of(harness, worker, rental_id, **token(alice))
    other = await access_token_of(harness, worker, rental_id, **token(harness.as_admin))
    assert passed_token.grant.startswith("client.")
    assert passed_token.number < other.number
    await harness.revoke("alice")
    assert await port_proxies.all_messages() == [(worker.worker_id, (f"* * {passed_token.grant}",))]


async def test_a_port_proxy_is_notified_when_a_port_becomes_private(harness: Harness) -> None:
    worker, rental_id, alice = await rented(harness)
    port_proxies = FakePortProxies(harness)
    await expose(alice, rental_id)
    assert (await access_token_of(harness, worker, rental_id)).grant == "public"
    await expose(alice, rental_id, public=False)
    assert await port_proxies.all_messages() == [(worker.worker_id, (f"{rental_id} {PORT} public",))]


async def test_a_notification_is_repeated_until_the_port_proxy_answers(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_connections, "RETRY_AFTER_S", 0.01)
    worker, rental_id, alice = await rented(harness)
    port_proxies = FakePortProxies(harness)
    passed_token = await access_token_of(harness, worker, rental_id, **token(alice))
    port_proxies.away = 3
    await harness.revoke("alice")
    assert await port_proxies.all_messages() == [(worker.worker_id, (f"* * {passed_token.grant}",))]


async def test_a_token_that_is_revoked_during_the_request_gets_no_access_token(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rental_id, alice = await rented(harness)
    looked_up = harness.manager.port_access.authentication.authenticate

    async def authenticated(*asked: Any) -> Any:
        found = await looked_up(*asked)
        await harness.revoke("alice")
        return found

    monkeypatch.setattr(harness.manager.port_access, "authentication", SimpleNamespace(authenticate=authenticated))
    assert not await PortRequests(harness, rental_id).is_allowed(**token(alice))


async def test_a_starting_manager_ends_open_connections_that_are_no_longer_allowed(harness: Harness) -> None:
    """The manager was away when a token ended, a port was closed, or the admin's token was replaced in its file."""
    worker, rental_id, alice = await rented(harness)
    await expose(alice, rental_id, port=8001)
    mallory = await harness.new_client("mallory")
    good = await access_token_of(harness, worker, rental_id, **token(alice))
    gone = (await access_token_of(harness, worker, rental_id, **token(harness.as_admin))).grant.replace(
        "admin.admin.", "admin.x."
    )
    anew = f"admin.admin.{'0' * 16}"
    assert mallory
    await harness.restart()
    port_proxies = FakePortProxies(harness)
    keep = [f"{rental_id} {PORT} {good.grant}", f"{rental_id} 8001 public"]
    end = [f"{rental_id} {PORT} {gone}", f"{rental_id} {PORT} {anew}", f"{rental_id} 8002 public"]
    port_proxies.is_open = keep + end
    harness.manager.port_connections.begin()
    assert await port_proxies.all_messages() == [(worker.worker_id, ()), (worker.worker_id, tuple(end))]
    assert port_proxies.is_open == keep
    await harness.revoke("alice")
    assert (await port_proxies.all_messages())[2:] == [(worker.worker_id, (f"* * {good.grant}",))]


async def test_port_proxies_that_do_not_answer_block_no_other(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_connections, "QUERIES_AT_ONCE", 1)
    monkeypatch.setattr(port_connections, "RETRY_AFTER_S", 3600.0)
    await harness.join()
    await harness.join()
    port_proxies = FakePortProxies(harness)
    port_proxies.away = 1
    harness.manager.port_connections.begin()
    async with asyncio.timeout(20):
        while not port_proxies.messages:  # noqa: ASYNC110 - a fake that only records messages
            await asyncio.sleep(0)
    assert len(port_proxies.messages) == 1, "the port proxy that was called second"


async def test_an_access_token_lasts_no_longer_than_the_port_key_or_the_token(harness: Harness) -> None:
    worker, rental_id, alice = await rented(harness)
    assert (await access_token_of(harness, worker, rental_id, **token(alice))).left_ms == 0
    key_value = await key(harness, alice, rental_id)
    assert (
        await access_token_of(harness, worker, rental_id, X_Orion_Key=key_value)
    ).left_ms == port_keys.LIFETIME_S * 1000
    short = await harness.new_client("alice", ttl_s=600)
    assert (await access_token_of(harness, worker, rental_id, **token(short))).left_ms == 600_000


async def test_a_port_key_of_a_replaced_admin_token_is_refused(harness: Harness) -> None:
    _, rental_id, _ = await rented(harness)
    key_value = await key(harness, harness.as_admin, rental_id)
    assert await PortRequests(harness, rental_id).is_allowed(X_Orion_Key=key_value)
    harness.secrets = replace(harness.secrets, admin_token=make_token("admin", "admin"))
    await harness.restart()
    assert not await PortRequests(harness, rental_id).is_allowed(X_Orion_Key=key_value)
