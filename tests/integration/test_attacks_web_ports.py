"""Tests of web ports through the real proxy and manager: a renter's process is hostile to clients and platform."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest
from orion_worker.web import refusals, responses
from platform_support import Platform, raw
from proxy_support import SECRET, outer_proxy, wait_until
from support.builders import host_key
from web_support import SECRETS, SLOP, MadeUpWorker, made_up_worker, our_cookie

from orion import wire
from orion.client.sdk import Orion

NOTHING = b""
MB = 1 << 20


@pytest.fixture(scope="module")
def alice(attacked: Platform) -> Iterator[httpx.Client]:
    with attacked.client(attacked.token("alice")) as client:
        yield client


@pytest.fixture(scope="module")
def anonymous(attacked: Platform) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=attacked.url, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def rental_id(alice: httpx.Client) -> str:
    reply = alice.post("/api/rent", json={"name": "web", "ssh_public_key": host_key(3)})
    assert reply.status_code == 201, reply.text
    return str(reply.json()["id"])


@pytest.fixture(scope="module")
def worker(attacked: Platform, rental_id: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeUpWorker]:
    with made_up_worker(attacked, tmp_path_factory.mktemp("worker")) as running:
        running.holds(rental_id)
        yield running


@pytest.fixture(scope="module")
def public(alice: httpx.Client, rental_id: str, worker: MadeUpWorker) -> str:
    """Return its path without a slash at the end."""
    reply = alice.put(f"/api/rentals/{rental_id}/ports/{worker.renter.port}", json={"public": True})
    return str(reply.raise_for_status().json()["path"]).rstrip("/")


@pytest.fixture
def private(alice: httpx.Client, rental_id: str, worker: MadeUpWorker, public: str) -> Iterator[str]:
    path = f"/api/rentals/{rental_id}/ports/{worker.renter.port}"
    alice.put(path, json={"public": False}).raise_for_status()
    yield public
    alice.put(path, json={"public": True}).raise_for_status()


def headers_at_renter(reply: httpx.Response) -> dict[str, str]:
    assert reply.status_code == 200, reply.text
    pairs = [(name.lower(), value) for name, value in reply.json()["headers"]]
    assert len(pairs) == len(dict(pairs)), f"a header came twice: {pairs}"
    return dict(pairs)


# Requests that a renter's process gets


def test_a_renter_s_server_gets_no_secret_of_the_platform_and_no_forged_header(
    attacked: Platform, alice: httpx.Client, public: str
) -> None:
    forged = {
        "Cookie": "a=b; orion_port=c",
        "X-Orion-Pass": "abcdefghij 1 8000 " + "0" * 64,
        "X-Orion-Proxy-Secret": "guess",
        "X-Orion-Worker": "127.0.0.1",
        "X-Orion-Key": "guess",
        "X-Forwarded-For": "6.6.6.6",
        "X-Real-IP": "6.6.6.6",
        "Forwarded": "for=6.6.6.6",
        "X-Forwarded-Prefix": "/elsewhere",
    }
    seen = headers_at_renter(alice.get(f"{public}/x?y=%2F..", headers=forged))
    text = json.dumps(seen)
    for secret in (SECRET, alice.headers["Authorization"].split()[1], "6.6.6.6", "guess", "elsewhere", "0" * 64):
        assert secret not in text, text
    assert not [name for name in seen if name.startswith("x-orion") or name in {"cookie", "authorization"}], text
    assert seen["x-forwarded-prefix"] == public
    assert seen["x-real-ip"] == seen["x-forwarded-for"] == f"{attacked.proxy.network}.1"
    assert seen["host"] == seen["x-forwarded-host"] == f"127.0.0.1:{attacked.proxy.http_port}"
    assert seen["connection"] == "close"


def test_the_path_after_the_port_and_the_renter_s_own_authorization_pass_unchanged(
    anonymous: httpx.Client, public: str
) -> None:
    reply = anonymous.get(f"{public}/a%2Fb//c/~d?e=%00", headers={"Authorization": "Basic YTpi"})
    assert reply.json()["line"] == "GET /a%2Fb//c/~d?e=%00 HTTP/1.1"
    assert headers_at_renter(reply)["authorization"] == "Basic YTpi"
    assert anonymous.get(public).headers["location"] == f"{public}/"


# Answers of a renter's process


def test_headers_of_a_renter_s_server_affect_only_its_own_page(anonymous: httpx.Client, public: str) -> None:
    said = anonymous.get(f"{public}/free").headers
    policies = said.get_list("content-security-policy")
    assert policies[0] == "sandbox allow-same-origin", "more of them only narrow"
    assert policies[1].startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in policies[1]
    assert said.get_list("referrer-policy") == ["no-referrer"]
    assert said.get_list("access-control-allow-origin") == ["*"]
    assert len(said.get_list("x-request-id")) == 1
    assert said["x-request-id"] != "mine"
    for name in ("set-cookie", "clear-site-data", "nel", "report-to", "strict-transport-security", "alt-svc"):
        assert name not in said
    for name in ("accept-ch", "access-control-allow-credentials", "x-orion-manager"):
        assert name not in said


@pytest.mark.parametrize("number", range(len(SECRETS)))
def test_the_proxy_obeys_no_header_of_a_renter_s_server(anonymous: httpx.Client, public: str, number: int) -> None:
    assert anonymous.get(f"{public}/accel/{number}").text == "its own"


@pytest.mark.parametrize("number", range(len(SLOP)))
async def test_an_invalid_answer_of_a_renter_s_server_never_passes_without_the_sandbox(
    attacked: Platform, worker: MadeUpWorker, public: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Try it with an honest worker, and with a hostile one whose port proxy checks no answer."""
    for checks_answers in (True, False):
        if not checks_answers:
            monkeypatch.setattr(responses, "_STATUS", re.compile(rb".*", re.DOTALL))
            monkeypatch.setattr(responses, "_INTERIM", re.compile(rb"never"))
            monkeypatch.setattr(responses, "PROXY_MARK", b"")
            monkeypatch.setattr(refusals, "PROXY_MARK", b"")
        for more in (b"", b"Upgrade: websocket\r\nConnection: upgrade\r\n") if number != 4 else (b"",):
            request = f"GET {public}/slop/{number} HTTP/1.1\r\nHost: x\r\n".encode() + more + b"\r\n"
            answer = await raw(attacked.proxy.http_port, request, request, within_s=2)
            assert b"<script>" not in answer, answer
            assert not answer or b"no_http" in answer


async def test_interim_answers_do_no_harm_and_only_the_port_proxy_accepts_them(
    attacked: Platform, worker: MadeUpWorker, anonymous: httpx.Client, public: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = await asyncio.to_thread(anonymous.get, f"{public}/hints")
    assert (reply.status_code, reply.text) == (200, "its own")
    assert "sandbox" in reply.headers["content-security-policy"]
    assert "link" not in reply.headers
    monkeypatch.setattr(responses, "_INTERIM", re.compile(rb"never"))
    request = f"GET {public}/hints HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    assert await raw(attacked.proxy.http_port, request, within_s=2) == NOTHING


@pytest.mark.parametrize("kilobytes", [5, 28])
def test_an_answer_may_have_large_cookies(
    anonymous: httpx.Client, public: str, rental_id: str, worker: MadeUpWorker, attacked: Platform, kilobytes: int
) -> None:
    assert anonymous.get(f"{public}/cookie/{kilobytes}").text == "its own"
    host = f"{worker.renter.port}-{rental_id}.localhost:{attacked.proxy.http_port}"
    own = anonymous.get(f"/cookie/{kilobytes}", headers={"Host": host})
    anonymous.cookies.clear()
    assert own.headers["set-cookie"] == f"a={'b' * (kilobytes << 10)}; Path=/"


@pytest.mark.parametrize(
    ("path", "code", "says"),
    [
        ("cookie/40", "answer_head_too_large", "30 KB"),
        ("malformed", "answer_unreadable", "malformed"),
        ("silence", "no_answer", "without an answer"),
    ],
)
def test_an_invalid_answer_of_a_renter_s_server_is_reported_as_the_renter_s_error(
    anonymous: httpx.Client, public: str, path: str, code: str, says: str
) -> None:
    reply = anonymous.get(f"{public}/{path}")
    assert (reply.status_code, reply.json()["code"]) == (502, code)
    assert says in reply.json()["detail"]


@pytest.mark.parametrize("method", ["PROPFIND", "REPORT", "MKCOL", "QUERY", "VERSION-CONTROL"])
def test_a_renters_program_may_know_more_methods_than_the_platform(
    anonymous: httpx.Client, public: str, rental_id: str, worker: MadeUpWorker, attacked: Platform, method: str
) -> None:
    host = f"{worker.renter.port}-{rental_id}.localhost:{attacked.proxy.http_port}"
    for path, headers in ((f"{public}/x", {}), ("/x", {"Host": host})):
        reply = anonymous.request(method, path, headers=headers, content=b"<a/>")
        assert reply.json().get("line") == f"{method} /x HTTP/1.1", reply.text
    assert anonymous.request(method, "/api/rentals").json()["code"] == "method_not_allowed"
    assert anonymous.request("TRACE", f"{public}/x").status_code == 405


def test_an_owner_opens_a_port_by_the_name_of_the_rental(
    alice: httpx.Client, anonymous: httpx.Client, private: str, rental_id: str, worker: MadeUpWorker
) -> None:
    port = worker.renter.port
    sent_on = alice.get(f"/r/web/{port}/a%2Fb?c=d")
    assert (sent_on.status_code, sent_on.headers["location"]) == (307, f"/r/{rental_id}/{port}/a%2Fb?c=d")
    followed = alice.put(f"/r/web/{port}", content=b"x", follow_redirects=True)
    assert followed.json()["line"] == "PUT / HTTP/1.1"
    refused = anonymous.get(f"/r/web/{port}/")
    assert (refused.status_code, refused.json()["code"]) == (401, "private")
    assert f"`orion open web {port}`" in refused.json()["detail"]
    for path in ("/r/web/", "/r/web/80/", "/r/x"):
        assert "orion open" in alice.get(path).json()["detail"]


def test_below_a_path_of_an_outer_proxy_a_web_port_and_its_key_are_found(
    attacked: Platform, alice: httpx.Client, private: str, rental_id: str, worker: MadeUpWorker
) -> None:
    port, token = worker.renter.port, alice.headers["Authorization"].split()[1]
    with (
        outer_proxy(attacked.proxy) as outer,
        Orion.at(f"{outer}/orion", token) as orion,
        httpx.Client(base_url=outer, trust_env=False, timeout=60) as browser,
    ):
        assert [rental.id for rental in orion.rentals()] == [rental_id]
        ticket = orion.web_port_ticket(rental_id, port)
        assert orion.opening_url(rental_id, ticket).startswith(f"{outer}/orion/.orion/open/#")
        assert orion.port_url(ticket) == f"{outer}/orion{private}/"
        assert browser.get("/orion/.orion/open/").status_code == 200
        form = {"rental": rental_id, "port": str(port), "ticket": ticket.ticket}
        opened = browser.post("/orion/.orion/open/ticket", data=form).headers["location"]
        assert opened.startswith(f"/orion{private}/~")
        seen = headers_at_renter(browser.get(f"{opened}x"))
        assert seen["x-forwarded-prefix"] == opened.rstrip("/")
        assert (seen["x-forwarded-proto"], seen["x-real-ip"]) == ("https", f"{attacked.proxy.network}.1")
        for program in ("redirect", "knows"):
            assert browser.get(f"{opened}{program}").headers["location"].startswith(f"{opened}login"), program
        assert browser.get(f"/orion{private}").headers["location"] == f"/orion{private}/"
        named = browser.get(f"/orion/r/web/{port}/x", headers={"Authorization": f"Bearer {token}"})
        assert named.headers["location"] == f"/orion{private}/x"


@pytest.mark.parametrize("status", [401, 403, 404, 500, 502, 503])
def test_an_error_of_a_renter_s_server_passes_unchanged(anonymous: httpx.Client, public: str, status: int) -> None:
    reply = anonymous.get(f"{public}/status/{status}")
    assert (reply.status_code, reply.text) == (status, "as the renter says")
    assert "sandbox" in reply.headers["content-security-policy"]


def test_a_redirect_of_a_program_that_knows_no_prefix_stays_in_its_port(anonymous: httpx.Client, public: str) -> None:
    assert anonymous.get(f"{public}/redirect").headers["location"] == f"{public}/login?a=b"


def test_a_page_in_a_sandbox_may_send_preflight_requests_to_its_own_port(anonymous: httpx.Client, public: str) -> None:
    asks = {"Origin": "null", "Access-Control-Request-Method": "POST"}
    reply = anonymous.options(f"{public}/x", headers=asks)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (204, "*")
    assert "access-control-allow-credentials" not in reply.headers


def test_the_calls_of_the_platform_are_not_opened_to_other_pages(alice: httpx.Client, public: str) -> None:
    for path in ("/api/rentals", "/terminal/", "/r/x", f"{public[:-5]}/80/"):
        reply = alice.get(path, headers={"Origin": "null"})
        assert "access-control-allow-origin" not in reply.headers
        assert "default-src 'none'" in reply.headers["content-security-policy"]


# Tricks


def tricks(rental_id: str, port: int, network: str) -> list[str]:
    its, other = f"/r/{rental_id}/{port}", "aaaaaaaaaa"
    return [
        f"{its}/../../{other}/{port}/",
        f"{its}/../../../r/{other}/{port}/",
        f"{its}/..%2f..%2f..%2f../../../../../api/rentals",
        f"{its}/../../../api/status",
        f"{its}/../../../.web/way",
        f"/r/{other}/../{rental_id}/{port}/x/../../../{other}/{port}/",
        f"//r/{rental_id}/{port}/",
        f"/r//{rental_id}/{port}/",
        f"/r/{rental_id}//{port}/",
        f"/%72/{rental_id}/{port}/",
        f"/r/{rental_id}/%38000/",
        f"/r/{rental_id}%2f{port}/",
        f"/r/{rental_id}/{port}%2f",
        f"/r/{rental_id}/{port}\\x",
        f"/R/{rental_id}/{port}/",
        f"/r/{rental_id.upper()}/{port}/",
        f"/r/{rental_id}/0{port}/",
        f"/r/{rental_id}/+{port}/",
        f"/r/{rental_id}/{port}:22/",
        f"/r/{rental_id}/{port}@127.0.0.1:22/",
        f"/r/{rental_id}@127.0.0.1/{port}/",
        *(f"/r/{rental_id}/{number}/" for number in (22, 80, 443, 5000 + 65536, 0, 65536, 1023, 99999)),
        *(
            f"/r/{host}/{port}/"
            for host in (f"{network}.1", f"{network}.2", f"{network}.3", "127.0.0.1", "169.254.169.254")
        ),
        *(f"/r/{host}/5000/" for host in ("manager_app", "localhost", "[::1]", "0x7f000001", "2130706433")),
        f"/r/{rental_id}/",
        "/r/",
        "/.web/way",
        "/.web/refused.json",
        "/.web/refused.html",
        "/.web/refused.",
        "/.web/unserved",
        "/web/way",
        "/web/open",
    ]


async def test_a_forged_path_reaches_no_renter_s_server_and_no_call(
    attacked: Platform, alice: httpx.Client, worker: MadeUpWorker, rental_id: str, public: str
) -> None:
    before, token = len(worker.renter.heads), alice.headers["Authorization"]
    for path in tricks(rental_id, worker.renter.port, attacked.proxy.network):
        lines = [f"GET {path} HTTP/1.1", "Host: x", f"Authorization: {token}", "Connection: close", "", ""]
        answer = await raw(attacked.proxy.http_port, "\r\n".join(lines).encode(), is_answered=True)
        assert answer.split()[1] in {b"400", b"404"}, (path, answer[:300])
        assert b"x-orion-pass" not in answer.lower(), path
    assert len(worker.renter.heads) == before


@pytest.mark.parametrize(
    "target", ["http://evil.example{}/x", "http://127.0.0.1:5000{}/x", "http://x@evil.example{}/x"]
)
async def test_another_host_in_the_request_line_or_the_header_reaches_no_other_server(
    attacked: Platform, worker: MadeUpWorker, public: str, target: str
) -> None:
    for host in ("evil.example", "manager_app:5000", f"{attacked.proxy.network}.3"):
        request = f"GET {target.format(public)} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        answer = await raw(attacked.proxy.http_port, request.encode(), is_answered=True)
        assert b"GET /x HTTP/1.1" in answer or answer.split()[1] == b"400", answer[:300]


@pytest.mark.parametrize(
    "line", ["Content-Length: 5\r\nContent-Length: 6", "Transfer-Encoding: chunked, identity", "X : y"]
)
async def test_a_request_of_doubtful_length_never_reaches_a_renter_s_server(
    attacked: Platform, worker: MadeUpWorker, public: str, line: str
) -> None:
    before = len(worker.renter.heads)
    smuggled = f"GET {public}/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    request = f"POST {public}/x HTTP/1.1\r\nHost: x\r\n{line}\r\n\r\n0\r\n\r\n{smuggled}"
    answer = await raw(attacked.proxy.http_port, request.encode(), within_s=3)
    assert answer.startswith(b"HTTP/1.1 400") or answer == NOTHING or b"501" in answer, answer
    assert not [head for head in worker.renter.heads[before:] if b"smuggled" in head]


async def test_both_lengths_at_once_are_one_request_or_none(
    attacked: Platform, worker: MadeUpWorker, public: str
) -> None:
    before = len(worker.renter.heads)
    inner = b"GET /smuggled HTTP/1.1\r\nHost: x\r\nX-Orion-Pass: x\r\n\r\n"
    head = (
        f"POST {public}/x HTTP/1.1\r\nHost: x\r\nContent-Length: {len(inner) + 5}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    await raw(attacked.proxy.http_port, head.encode() + b"0\r\n\r\n" + inner, within_s=2)
    assert not [head for head in worker.renter.heads[before:] if b"smuggled" in head.split(b"\r\n")[0]]


def test_a_second_answer_on_a_connection_to_a_renter_s_server_reaches_no_client(
    anonymous: httpx.Client, public: str
) -> None:
    for _ in range(3):
        assert anonymous.get(f"{public}/twice").text == "first"
        assert anonymous.get("/healthz").json() == {"status": "ok"}


# Permissions, and ports without a server


def test_only_the_owner_can_distinguish_a_private_port_from_a_missing_one(
    attacked: Platform, anonymous: httpx.Client, alice: httpx.Client, private: str, worker: MadeUpWorker
) -> None:
    before = len(worker.renter.heads)
    refused = anonymous.get(f"{private}/x")
    assert (refused.status_code, refused.json()["code"]) == (401, "private")
    assert "sandbox" not in refused.headers["content-security-policy"], "this page is the platform's own"
    assert anonymous.get("/r/aaaaaaaaaa/8000/").json()["code"] == "private"
    with attacked.client(attacked.token("mallory")) as mallory:
        assert mallory.get(f"{private}/x").json()["code"] == "not_found"
        assert mallory.post(f"{private}/x", content=b"x" * 1000).json()["code"] == "not_found"
        assert mallory.post(f"{private}/x", content=b"x" * MB).json()["code"] == "not_found", "no byte of it is read"
    assert len(worker.renter.heads) == before
    assert alice.get(f"{private}/x").status_code == 200


def test_a_browser_opens_a_private_port_by_a_ticket_and_its_key_is_in_no_log(
    attacked: Platform, alice: httpx.Client, anonymous: httpx.Client, private: str, rental_id: str, worker: MadeUpWorker
) -> None:
    page = anonymous.get("/.orion/open/")
    assert "form-action 'self'" in page.headers["content-security-policy"]
    port = str(worker.renter.port)
    ticket = alice.post(f"/api/rentals/{rental_id}/ports/{port}/ticket").json()["ticket"]
    form = {"rental": rental_id, "port": port, "ticket": ticket}
    sent_on = anonymous.post("/.orion/open/ticket", data=form)
    assert (sent_on.status_code, "set-cookie" in sent_on.headers) == (303, False)
    assert anonymous.post("/.orion/open/ticket", data=form).status_code == 401
    assert anonymous.get("/.orion/open/ticket").status_code == 404
    address = sent_on.headers["location"]
    seen = headers_at_renter(anonymous.get(f"{address}x"))
    assert seen["x-forwarded-prefix"] == address.rstrip("/")
    key = address.partition("~")[2].rstrip("/")
    assert anonymous.get(f"{address}redirect").headers["location"] == f"{address}login?a=b"
    for strange in (key[:-1], key + "x", key.replace("client", "admin"), "x" * 43 + key[43:]):
        assert anonymous.get(f"{private}/~{strange}/x").status_code == 401, strange
    other = f"/r/{rental_id}/{worker.renter.port + 1}/~{key}/x"
    assert anonymous.get(other).status_code == 401
    wait_until(
        lambda: any(line["path"] == f"{private}/~/x" for line in attacked.proxy.access_log()), "it is in the log"
    )
    assert key[:43] not in attacked.proxy.logs()


def test_a_port_without_a_server_and_an_absent_rental_have_their_own_errors(
    alice: httpx.Client, rental_id: str, worker: MadeUpWorker, public: str
) -> None:
    reply = alice.get(f"/r/{rental_id}/{worker.renter.port - 1}/")
    assert (reply.status_code, reply.json()["code"]) == (502, "nothing_listens")
    page = alice.get(f"/r/{rental_id}/{worker.renter.port - 1}/", headers={"Accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    worker.holds(rental_id, epoch=2)  # which the manager does not know of
    reply = alice.get(f"{public}/x")
    assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "not_here", "2")
    worker.holds(rental_id)


def test_an_unreachable_worker_is_reported_with_the_advice_to_retry(
    attacked: Platform, alice: httpx.Client, public: str, worker: MadeUpWorker
) -> None:
    worker.port_proxy._peers = frozenset()  # it hangs up on the proxy
    reply = alice.get(f"{public}/x")
    worker.port_proxy._peers = frozenset({f"{attacked.proxy.network}.2"})
    assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "worker_unreachable", "2")


# Transfers


def test_streams_pass_as_they_come(anonymous: httpx.Client, public: str, worker: MadeUpWorker) -> None:
    with anonymous.stream("GET", f"{public}/stream") as reply:
        lines = reply.iter_lines()
        assert next(lines) == "one"
        worker.goes_on()
        assert next(lines) == "two"


def test_large_bodies_pass_without_being_buffered(anonymous: httpx.Client, public: str) -> None:
    assert anonymous.post(f"{public}/upload", content=b"x" * 40 * MB).text == str(40 * MB)


def heard(there: socket.socket, until: bytes) -> bytes:
    """Return the received bytes, up to and with these."""
    got = b""
    while not got.endswith(until):
        part = there.recv(1000)
        assert part, (got, "it ended")
        got += part
    return got


def test_a_websocket_passes_and_ends_when_the_rental_may_no_longer_run_on_its_worker(
    attacked: Platform, rental_id: str, worker: MadeUpWorker, public: str
) -> None:
    request = f"GET {public}/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"
    with socket.create_connection(("127.0.0.1", attacked.proxy.http_port)) as there:
        there.settimeout(60)
        there.sendall(request.encode())
        assert heard(there, b"\r\n\r\n").startswith(b"HTTP/1.1 101")
        there.sendall(b"echoed")
        assert heard(there, b"echoed") == b"echoed"
        worker.holds(rental_id, epoch=2)
        try:
            while there.recv(1000):
                pass
        except ConnectionResetError:
            pass
        worker.holds(rental_id)


ENDS_IN_S = 12
"""Seconds until a token ends by itself: those in which a busy machine has opened two connections by it."""


@pytest.fixture(params=["made private", "revoked", "its time is over"])
def opened(
    attacked: Platform,
    alice: httpx.Client,
    rental_id: str,
    worker: MadeUpWorker,
    public: str,
    request: pytest.FixtureRequest,
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield headers that open the port, and a function that ends that permission."""
    path = f"/api/rentals/{rental_id}/ports/{worker.renter.port}"
    if request.param == "made private":
        yield "", lambda: alice.put(path, json={"public": False}).raise_for_status()
        alice.put(path, json={"public": True}).raise_for_status()
        return
    alice.put(path, json={"public": False}).raise_for_status()
    with attacked.client(attacked.secrets.admin_token) as admin:
        by_itself = request.param == "its time is over"
        ttl_s = wire.MIN_TTL_S if by_itself else None
        token = admin.post("/api/tokens", json={"name": "alice", "ttl_s": ttl_s}).raise_for_status().json()
        ends = f"/api/tokens/{token['id']}"
        if by_itself:  # sooner than a request for a token takes
            with sqlite3.connect(attacked.folder / "orion.db", timeout=60) as database:
                ends_at = time.time() + ENDS_IN_S
                database.execute("UPDATE tokens SET expires_at = ? WHERE id = ?", (ends_at, token["id"]))
        yield (
            f"Authorization: Bearer {token['token']}\r\n",
            (lambda: None) if by_itself else lambda: admin.delete(ends).raise_for_status(),
        )
        admin.delete(ends).raise_for_status()
    alice.put(path, json={"public": True}).raise_for_status()


def test_an_open_connection_ends_with_the_permission_that_opened_it(
    attacked: Platform, public: str, opened: tuple[str, Callable[[], object]]
) -> None:
    """Open a WebSocket and an endless download, of which neither is authorized again while it is open."""
    headers, end = opened
    upgrade = f"GET {public}/ws HTTP/1.1\r\nHost: x\r\n{headers}Upgrade: websocket\r\nConnection: upgrade\r\n\r\n"
    # Without it Nginx ends the answer, and keeps its connection with the client for the next request.
    download = f"GET {public}/wait HTTP/1.1\r\nHost: x\r\n{headers}Connection: close\r\n\r\n"
    with ExitStack() as open_ones:
        connections = []
        for text, status in ((upgrade, b"HTTP/1.1 101"), (download, b"HTTP/1.1 200")):
            there = open_ones.enter_context(socket.create_connection(("127.0.0.1", attacked.proxy.http_port)))
            there.settimeout(60)
            there.sendall(text.encode())
            assert there.recv(1000).startswith(status)
            connections.append(there)
        end()
        for there in connections:
            with suppress(ConnectionResetError):
                while there.recv(1000):
                    pass


def test_a_web_port_works_over_https_and_http_2(attacked: Platform, public: str) -> None:
    url = f"https://127.0.0.1:{attacked.proxy.https_port}{public}/x"
    command = ["curl", "-sSk", "--http2", "--max-time", "60", "-w", "\n%{http_version}", url]
    body, _, version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition("\n")
    seen = {name.lower(): value for name, value in json.loads(body)["headers"]}
    assert version == "2"
    assert (seen["x-forwarded-proto"], seen["host"]) == ("https", f"127.0.0.1:{attacked.proxy.https_port}")


def test_only_a_websocket_is_an_upgrade(anonymous: httpx.Client, public: str) -> None:
    seen = headers_at_renter(anonymous.get(f"{public}/x", headers={"Upgrade": "h2c", "HTTP2-Settings": "x"}))
    assert "upgrade" not in seen
    assert seen["connection"] == "close"


def test_a_rental_has_at_most_a_hundred_connections_and_calls_of_the_api_still_work(
    attacked: Platform, anonymous: httpx.Client, public: str
) -> None:
    with ExitStack() as open_ones:
        request = f"GET {public}/wait HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        for _ in range(100):
            one = open_ones.enter_context(socket.create_connection(("127.0.0.1", attacked.proxy.http_port)))
            one.sendall(request)
            assert one.recv(100).startswith(b"HTTP/1.1 200")
        refused = anonymous.get(f"{public}/x")
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_connections")
        assert "web ports of this rental" in refused.json()["detail"]
        assert anonymous.get("/healthz").status_code == 200
    wait_until(lambda: anonymous.get(f"{public}/x").status_code == 200, "closed connections are forgotten")


def test_unknown_clients_that_send_byte_by_byte_use_no_connection_of_a_rental(
    attacked: Platform, alice: httpx.Client, private: str
) -> None:
    """Check that each is refused before its body arrives, and is forgotten soon, however slow the body is."""
    request = f"POST {private}/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\na".encode()
    with ExitStack() as unknown_rentals:
        connections = []
        for _ in range(110):
            connection = socket.create_connection(("127.0.0.1", attacked.proxy.http_port))
            connections.append(unknown_rentals.enter_context(connection))
            connection.settimeout(60)
            connection.sendall(request)
        answers = {connection.recv(12) for connection in connections}
        assert answers - {b"HTTP/1.1 429"} == {b"HTTP/1.1 401"}, "before their bodies have come"
        deadline = time.monotonic() + 20  # without a limit Nginx would read on for 30 s, its own
        while alice.get(f"{private}/x").status_code != 200:
            assert time.monotonic() < deadline, "refused clients are not forgotten"
            for connection in connections:
                with suppress(OSError):
                    connection.send(b"a")


# On a host name of its own


def test_a_port_on_its_own_host_keeps_its_cookies_and_headers_and_gets_none_of_the_platform(
    attacked: Platform, alice: httpx.Client, anonymous: httpx.Client, private: str, rental_id: str, worker: MadeUpWorker
) -> None:
    port = str(worker.renter.port)
    host = f"{port}-{rental_id}.localhost:{attacked.proxy.http_port}"
    assert anonymous.get("/x", headers={"Host": host}).json()["code"] == "private"
    ticket = alice.post(f"/api/rentals/{rental_id}/ports/{port}/ticket").json()
    assert ticket["host"] == host.partition(":")[0]
    form = {"rental": rental_id, "port": port, "ticket": ticket["ticket"]}
    sent_on = anonymous.post("/.orion/open/ticket", data=form, headers={"Host": host})
    assert (sent_on.status_code, sent_on.headers["location"]) == (303, "/")
    cookie = sent_on.headers["set-cookie"]
    assert "HttpOnly" in cookie
    key = cookie.partition(";")[0].partition("=")[2]
    anonymous.cookies.clear()
    for sent, passed in (
        (our_cookie(key), None),
        (f"a=b; {our_cookie(key)}", "a=b;"),
        (f"{our_cookie(key)}; a=b; c=d", " a=b; c=d"),
        (f"a=b; {our_cookie(key)}; c=d", "a=b; c=d"),
        (f"{our_cookie('x')}; {our_cookie(key)}; c=d", None),
    ):
        seen = headers_at_renter(anonymous.get("/x", headers={"Host": host, "Cookie": sent}))
        assert seen.get("cookie", "").strip() == (passed or "").strip(), sent
        assert key not in json.dumps(seen)
        assert "x-forwarded-prefix" not in seen
    said = anonymous.get("/free", headers={"Host": host, "Cookie": our_cookie(key)}).headers
    assert len(said.get_list("set-cookie")) == 2
    assert said.get_list("cross-origin-resource-policy") == ["same-origin"]
    assert said.get_list("content-security-policy")[1] == "frame-ancestors 'self'"
    assert "strict-transport-security" not in said
    stolen = {"Host": host, "Cookie": our_cookie(key), "Origin": "http://8000-aaaaaaaaaa.localhost"}
    assert anonymous.get("/x", headers=stolen).status_code == 403
    elsewhere = {"Host": f"8000-{rental_id}.localhost", "Cookie": our_cookie(key)}
    assert anonymous.get("/x", headers=elsewhere).status_code == 401
    assert anonymous.get("/api/rentals", headers={"Host": host}).json()["code"] == "private", "no call of the platform"
    for path in ("/.web/way", "/.orion/x"):
        assert SECRET not in anonymous.get(path, headers={"Host": host, "Cookie": our_cookie(key)}).text
