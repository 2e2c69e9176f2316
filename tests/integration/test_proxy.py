"""The real proxy: Nginx from docker-compose.yml, called from outside through its published ports."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from http.client import HTTPResponse
from pathlib import Path
from queue import SimpleQueue

import httpx
import pytest
from proxy_support import ROOT, SECRET, EchoManager, Proxy, new_proxy, outer_proxy, wait_until
from websockets.asyncio.client import connect as connect_in_one_thread
from websockets.exceptions import InvalidStatus
from websockets.sync import client as websocket

ask = partial(httpx.request, trust_env=False, timeout=60)
get, post = partial(ask, "GET"), partial(ask, "POST")
connect = partial(websocket.connect, proxy=None, open_timeout=60)
"""Their own limits of 5 and 10 s were once too short, where other tests start containers and browsers meanwhile."""
HEARTBEAT, REGISTER, RENT, REST = "/api/heartbeat", "/api/register", "/api/rent", "/api/rentals"


def token(number: int = 1, role: str = "client") -> str:
    return f"orion_{role}_t-{number}_{number:043d}"


def bearer(number: int = 1, role: str = "client") -> dict[str, str]:
    return {"Authorization": f"Bearer {token(number, role)}"}


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with new_proxy(app_host=1) as running:
        wait_until(lambda: "waiting for /run/orion-proxy/secret" in running.logs(), "the proxy logs that it waits")
        assert not running.answers()
        running.give_secret()
        wait_until(running.answers, "the proxy answers")
        yield running


@pytest.fixture(scope="module")
def manager(proxy: Proxy) -> Iterator[EchoManager]:
    running = EchoManager(proxy.app_address)
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(proxy: Proxy, manager: EchoManager) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=proxy.url, trust_env=False, timeout=60) as client:
        yield client


def headers_at_manager(reply: httpx.Response) -> dict[str, str]:
    pairs = reply.json()["headers"]
    assert len(pairs) == len(dict(pairs)), f"a header came twice: {pairs}"
    return dict(pairs)


def assert_problem(reply: httpx.Response, status: int, code: str) -> None:
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["title"]
    assert problem["detail"]
    assert len(reply.headers["x-request-id"]) == 32


# Requests that reach the manager


def test_the_proxy_sends_the_secret_the_peer_and_the_request_to_the_manager(client: httpx.Client, proxy: Proxy) -> None:
    reply = client.get(f"{REST}?name=a", headers=bearer())
    seen = headers_at_manager(reply)
    assert seen["x-orion-proxy-secret"] == SECRET
    assert seen["x-real-ip"] == f"{proxy.network}.1"
    assert seen["authorization"] == bearer()["Authorization"]
    assert seen["x-request-id"] == reply.headers["x-request-id"]
    assert reply.json()["query"] == "name=a"


def test_a_client_cannot_send_headers_that_only_the_proxy_may_set(client: httpx.Client, proxy: Proxy) -> None:
    forged = {
        "X-Orion-Proxy-Secret": "guess",
        "X_Orion_Proxy_Secret": "guess",
        "X-Orion-Manager": "unreachable",
        "X-Orion-Anything": "guess",
        "X-Real-IP": "6.6.6.6",
        "X-Forwarded-For": "6.6.6.6",
        "X-Request-ID": "chosen",
        "Forwarded": "for=6.6.6.6",
    }
    seen = headers_at_manager(client.get(REST, headers=forged))
    assert seen["x-orion-proxy-secret"] == SECRET
    assert seen["x-real-ip"] == f"{proxy.network}.1"
    assert "6.6.6.6" not in str(seen)
    assert "guess" not in str(seen)
    assert "chosen" not in str(seen)
    assert "x-orion-manager" not in seen


def test_the_headers_of_the_contract_pass(client: httpx.Client) -> None:
    sent = {
        "Idempotency-Key": "k1",
        "Last-Event-ID": "7",
        "Content-Type": "application/json",
        "Accept": "application/json",
    }
    seen = headers_at_manager(client.post(RENT, content=b"{}", headers=sent))
    assert {name: seen[name.lower()] for name in sent} == sent
    assert seen["content-length"] == "2"


def test_healthz_and_metrics_pass_and_nothing_outside_the_contract_does(client: httpx.Client) -> None:
    assert client.get("/healthz").json()["path"] == "/healthz"
    assert client.get("/metrics").json()["path"] == "/metrics"
    assert client.get("/").text.startswith("Orion-Sec")
    assert_problem(client.get("/metrics/"), 404, "not_found")
    assert_problem(client.get("/.git/config"), 404, "not_found")


# Answers


def test_replies_carry_the_security_headers_and_no_version(client: httpx.Client) -> None:
    for path in ("/", REST, "/nothing-here"):
        headers = client.get(path).headers
        assert headers["server"] == "nginx"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"


def test_the_page_with_the_terminal_may_load_only_its_own_scripts(client: httpx.Client) -> None:
    kinds = {"": "html", "terminal.js": "javascript", "terminal.css": "css", "xterm/xterm.js": "javascript"}
    kinds |= {f"xterm/xterm-addon-{name}.js": "javascript" for name in ("fit", "unicode11", "web-links")}
    for name, kind in kinds.items():
        reply = client.get(f"/terminal/{name}")
        assert (reply.status_code, reply.headers["content-type"]) == (200, f"text/{kind}; charset=utf-8")
        rules = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
        assert (rules["default-src"], rules["script-src"], rules["connect-src"]) == ("'none'", "'self'", "'self'")
        assert rules["frame-ancestors"] == "'none'"
        assert reply.headers["x-frame-options"] == "DENY"
    assert client.get("/terminal").headers["location"] == "/terminal/"
    assert_problem(client.get("/terminal/nothing.js"), 404, "not_found")
    assert_problem(client.get("/terminal/xterm/"), 404, "not_found")
    assert_problem(client.post("/terminal/", content=b"x"), 405, "method_not_allowed")
    assert "script-src" not in client.get("/terminals/").headers["content-security-policy"]


def test_the_proxy_sends_the_host_and_port_of_the_browser_to_the_manager(client: httpx.Client, proxy: Proxy) -> None:
    forged = {"X-Forwarded-Host": "evil.example"}
    seen = headers_at_manager(client.get("/api/rentals/abc/terminal", headers=forged))
    assert seen["x-forwarded-host"] == f"127.0.0.1:{proxy.http_port}"


@pytest.mark.parametrize("status", [401, 404, 413, 429, 500, 502, 503, 504])
def test_an_error_of_the_manager_passes_unchanged_and_without_the_proxy_s_mark(
    client: httpx.Client, status: int
) -> None:
    reply = client.get(f"/api/answer/{status}")
    assert reply.status_code == status
    assert reply.json()["path"] == f"/api/answer/{status}"
    assert "x-orion-manager" not in reply.headers
    assert reply.headers.get_list("retry-after") == ["77"]
    assert reply.headers.get_list("x-request-id") != ["forged"]


def test_a_manager_that_breaks_off_an_answer_is_not_reported_as_unreachable(client: httpx.Client) -> None:
    reply = client.post("/api/lost", content=b"{}")
    assert_problem(reply, 502, "manager_no_answer")
    assert "x-orion-manager" not in reply.headers


# Sizes


def test_a_body_over_the_limit_is_refused_as_a_problem(client: httpx.Client) -> None:
    assert client.post(RENT, content=b"x" * 250_000).json()["size"] == 250_000
    assert_problem(client.post(RENT, content=b"x" * 270_000), 413, "body_too_large")
    chunks = iter([b"x" * 100_000] * 3)
    assert_problem(client.post(RENT, content=chunks), 413, "body_too_large")


@pytest.mark.parametrize("path", [REGISTER, HEARTBEAT])
def test_an_inventory_may_be_larger_than_other_bodies(client: httpx.Client, path: str) -> None:
    assert client.post(path, content=b"x" * 1_900_000, headers=bearer(50)).json()["size"] == 1_900_000
    assert_problem(client.post(path, content=b"x" * 2_200_000, headers=bearer(50)), 413, "body_too_large")


def test_long_addresses_and_headers_are_refused_as_problems(client: httpx.Client) -> None:
    assert client.get(f"{REST}?after={'a' * 3000}").status_code == 200
    assert_problem(client.get(f"{REST}?after={'a' * 5000}"), 414, "uri_too_long")
    assert_problem(client.get(REST, headers={"X-Long": "a" * 20_000}), 431, "headers_too_large")


def test_the_proxy_refuses_a_request_that_is_not_http_with_a_problem(proxy: Proxy, manager: EchoManager) -> None:
    with socket.create_connection(("127.0.0.1", proxy.http_port), timeout=60) as raw:
        raw.sendall(b"GET /api/rentals HTTP/1.1\r\n\r\n")
        answer = raw.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 400 ")
    assert '"code":"invalid_request"' in answer


# Limits


def at_once(url: str | httpx.URL, calls: Iterable[tuple[str, dict[str, str]]]) -> list[httpx.Response]:
    """POST to each path with its headers, sixteen at a time; return the answers in the same order.

    By hand: for a client of httpx a call takes about as long as a limit has for one, where others have the machine too.
    """
    place = httpx.URL(url)
    idle: SimpleQueue[socket.socket] = SimpleQueue()

    def call(one: tuple[str, dict[str, str]]) -> httpx.Response:
        path, headers = one
        lines = [f"POST {path} HTTP/1.1", f"Host: {place.host}", "Content-Length: 2"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        there = idle.get()
        try:
            there.sendall("\r\n".join([*lines, "", "{}"]).encode())
            answer = HTTPResponse(there, method="POST")
            answer.begin()
            return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())
        finally:
            idle.put(there)

    with ExitStack() as open_ones, ThreadPoolExecutor(16) as pool:
        for _ in range(16):
            idle.put(open_ones.enter_context(socket.create_connection((place.host, place.port or 80), timeout=60)))
        return list(pool.map(call, calls))


def flood(client: httpx.Client, path: str, number: int, headers: dict[str, str]) -> list[httpx.Response]:
    return at_once(client.base_url, [(path, headers)] * number)


def refused(replies: list[httpx.Response]) -> list[httpx.Response]:
    return [reply for reply in replies if reply.status_code == 429]


# First of its kind: the floods below leave the bucket of this address full.
def test_forty_workers_behind_one_address_register_at_once(client: httpx.Client) -> None:
    assert not refused(flood(client, REGISTER, 40, bearer(120, "join")))


FLOODS = {REGISTER: 150, HEARTBEAT: 200, RENT: 1200, REST: 2500}


@pytest.mark.parametrize("flooded", FLOODS)
def test_a_flood_of_one_kind_is_refused_and_starves_no_other(client: httpx.Client, flooded: str) -> None:
    caller = bearer(100 + list(FLOODS).index(flooded))
    replies = flood(client, flooded, FLOODS[flooded], caller)
    limited = refused(replies)
    assert limited, f"{len(replies)} calls to {flooded} passed"
    assert_problem(limited[0], 429, "rate_limited")
    assert limited[0].headers["retry-after"] == "1"
    assert "x-orion-manager" not in limited[0].headers
    for other in set(FLOODS) - {flooded, REGISTER}:
        assert client.post(other, headers=caller).status_code == 200, f"{flooded} starved {other}"


def test_the_refusals_of_a_flood_do_not_fill_the_log(proxy: Proxy, client: httpx.Client) -> None:
    limited = refused(flood(client, RENT, 1200, bearer(104)))
    assert len(limited) > 300
    last = client.get(REST, headers=bearer(105)).headers["x-request-id"]
    wait_until(lambda: any(line["request_id"] == last for line in proxy.access_log()), "the log has the later requests")
    identities = {reply.headers["x-request-id"] for reply in limited}
    assert sum(line["request_id"] in identities for line in proxy.access_log()) < len(limited) / 10


def test_a_flood_of_other_requests_does_not_disturb_registrations(client: httpx.Client) -> None:
    wait_until(lambda: client.post(REGISTER).status_code == 200, "an earlier flood of registrations is over")
    time.sleep(1)  # for five more
    assert refused(flood(client, HEARTBEAT, 200, bearer(110)))
    assert client.post(REGISTER).status_code == 200


@pytest.mark.parametrize("path", [HEARTBEAT, RENT])
def test_a_token_over_its_limit_does_not_affect_another_one_at_the_same_address(
    client: httpx.Client, path: str
) -> None:
    assert refused(flood(client, path, FLOODS[path], bearer(200)))
    assert client.post(path, headers=bearer(201)).status_code == 200


def test_heartbeats_with_invented_tokens_are_limited_by_their_address(client: httpx.Client) -> None:
    """Send more than one worker does, which sends a few in a minute."""
    calls = [(HEARTBEAT, bearer(1000 + number, "worker")) for number in range(1500)]
    answers = [reply.status_code for reply in at_once(client.base_url, calls)]
    assert set(answers) == {200, 429}
    assert answers.count(200) >= 300
    assert client.post(REST, headers=bearer(1)).status_code == 200


def test_requests_with_malformed_tokens_are_counted_by_address(client: httpx.Client) -> None:
    calls = [(HEARTBEAT, {"Authorization": f"Bearer {number}"}) for number in range(200)]
    assert refused(at_once(client.base_url, calls))


# Long connections


def websocket_url(proxy: Proxy, rental: str = "abc", scheme: str = "ws") -> str:
    port = proxy.http_port if scheme == "ws" else proxy.https_port
    return f"{scheme}://localhost:{port}/api/rentals/{rental}/ssh"


def test_a_websocket_passes_messages_in_both_directions(proxy: Proxy, client: httpx.Client) -> None:
    with connect(websocket_url(proxy), additional_headers=bearer()) as shell:
        for message in (b"\0\1\2", b"x" * 60_000):
            shell.send(message)
            assert shell.recv() == message


def test_the_manager_s_refusal_of_a_websocket_passes_unchanged(proxy: Proxy, client: httpx.Client) -> None:
    with pytest.raises(InvalidStatus) as refusal, connect(websocket_url(proxy, "other")):
        pass
    assert refusal.value.response.status_code == 403
    assert refusal.value.response.body == b"not yours"


async def test_a_caller_has_at_most_two_hundred_sessions_and_its_calls_still_work(
    proxy: Proxy, manager: EchoManager
) -> None:
    open_session = partial(connect_in_one_thread, additional_headers=bearer(77), proxy=None, open_timeout=60)
    async with AsyncExitStack() as open_ones:
        for _ in range(200):
            await open_ones.enter_async_context(open_session(websocket_url(proxy)))
        with pytest.raises(InvalidStatus) as refusal:
            await open_session(websocket_url(proxy))
        assert refusal.value.response.status_code == 429
        problem = json.loads(refusal.value.response.body or b"")
        assert (problem["code"], "200 open sessions" in problem["detail"]) == ("too_many_connections", True)
        async with httpx.AsyncClient(base_url=proxy.url, trust_env=False, timeout=60) as http:
            assert (await http.get(REST, headers=bearer(77))).status_code == 200


def test_only_a_websocket_is_an_upgrade(client: httpx.Client) -> None:
    seen = headers_at_manager(client.get(REST, headers={"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings"}))
    assert "upgrade" not in seen


def test_the_proxy_forwards_an_event_at_once(client: httpx.Client, manager: EchoManager) -> None:
    with client.stream("GET", "/api/events", headers={"Accept": "text/event-stream"}) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "id: 1"
        manager.goes_on.set()  # not before the first has come
        assert "id: 2" in lines


# TLS


def certificate(proxy: Proxy) -> str:
    return ssl.get_server_certificate(("127.0.0.1", proxy.https_port))


def trusting(pem: str) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=pem)


def test_the_certificate_made_at_first_start_verifies(proxy: Proxy, client: httpx.Client) -> None:
    trust = trusting(certificate(proxy))
    for host in ("localhost", "127.0.0.1"):
        reply = get(f"https://{host}:{proxy.https_port}{REST}", verify=trust)
        assert headers_at_manager(reply)["x-forwarded-proto"] == "https"
    assert asyncio.run(_echo(websocket_url(proxy, scheme="wss"), b"over TLS", trust)) == b"over TLS"


async def _echo(url: str, sent: bytes, trust: ssl.SSLContext) -> str | bytes:
    """Return the answer, by a client with one thread.

    A client with two threads reads and writes one TLS connection at the same time, and may lose bytes that it sends.
    """
    async with connect_in_one_thread(url, ssl=trust, proxy=None, open_timeout=60) as shell:
        await shell.send(sent)
        return await shell.recv()


def test_the_certificate_has_the_configured_names(proxy: Proxy, tmp_path: Path) -> None:
    pem = tmp_path / "tls.crt"
    pem.write_text(certificate(proxy))
    shown = subprocess.run(
        ["openssl", "x509", "-in", pem, "-noout", "-text"], capture_output=True, text=True, check=True
    )
    for name in ("DNS:localhost", "DNS:lab.example", "IP Address:192.0.2.7", "id-ecPublicKey"):
        assert name in shown.stdout
    from_when = ["openssl", "x509", "-in", pem, "-noout", "-startdate"]
    begins = subprocess.run(from_when, capture_output=True, text=True, check=True).stdout.strip().partition("=")[2]
    assert ssl.cert_time_to_seconds(begins) < time.time() - 86_400, "a client's clock may be late"


def test_old_protocols_are_refused(proxy: Proxy) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=certificate(proxy))
    context.set_ciphers("ALL:@SECLEVEL=0")  # otherwise the client would refuse before the proxy does
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        pytest.raises(ssl.SSLError, match="alert protocol version"),
        socket.create_connection(("127.0.0.1", proxy.https_port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost"),
    ):
        pass


def test_http_to_the_port_of_https_is_a_problem(proxy: Proxy, client: httpx.Client) -> None:
    assert_problem(get(f"http://127.0.0.1:{proxy.https_port}{REST}"), 400, "invalid_request")


def test_a_renewed_certificate_is_served_within_15_s_and_open_connections_stay_open(
    proxy: Proxy, client: httpx.Client
) -> None:
    before = certificate(proxy)
    new_pair = (
        "cd /etc/orion-tls; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 9"
        " -subj /CN=renewed -addext subjectAltName=DNS:localhost -keyout /tmp/new.key -out /tmp/new.crt 2>/tmp/said"
    )
    assert proxy.exec("sh", "-c", f"{new_pair} && cp /tmp/new.key tls.key").returncode == 0
    with connect(websocket_url(proxy)) as shell:
        time.sleep(11)  # it has looked, and half of a pair is none
        assert certificate(proxy) == before
        assert proxy.exec("sh", "-c", "cp /tmp/new.crt /etc/orion-tls/tls.crt").returncode == 0
        wait_until(lambda: certificate(proxy) != before, "the new certificate is served")
        shell.send(b"still there")
        assert shell.recv() == b"still there"
    new = proxy.exec("cat", "/etc/orion-tls/tls.crt").stdout

    def is_served() -> bool:
        """Return whether a connection meets the new one: for a moment the processes of before still accept some."""
        try:
            return get(f"https://localhost:{proxy.https_port}/", verify=trusting(new)).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(is_served, "a visitor that trusts it is served")


# An outer proxy


@pytest.fixture(scope="module")
def outer(proxy: Proxy, manager: EchoManager) -> Iterator[str]:
    with outer_proxy(proxy) as address:
        yield address


def test_a_trusted_outer_proxy_determines_the_address_of_the_visitor(proxy: Proxy, outer: str) -> None:
    forged = {"X-Forwarded-For": "6.6.6.6", "X-Real-IP": "6.6.6.6", "X-Forwarded-Prefix": "/evil"}
    seen = headers_at_manager(get(f"{outer}/orion{REST}", headers=forged))
    assert seen["x-real-ip"] == f"{proxy.network}.1"
    assert seen["x-forwarded-proto"] == "https"
    assert seen["x-forwarded-host"] == f"{proxy.outer_address}:8000"
    says = headers_at_manager(get(f"{outer}{REST}", headers={"X-Says": "2001:db8::7"}))
    assert says["x-real-ip"] == "2001:db8::7"
    direct = headers_at_manager(get(f"{proxy.url}{REST}", headers={"X-Forwarded-For": "6.6.6.6"}))
    assert direct["x-real-ip"] == f"{proxy.network}.1"


def test_no_header_of_an_outer_proxy_turns_a_visitor_into_a_worker(proxy: Proxy, outer: str) -> None:
    for path in (REGISTER, HEARTBEAT):
        headers = bearer(900, "worker") | {"X-Says": f"{proxy.network}.200"}
        seen = headers_at_manager(post(f"{outer}{path}", headers=headers))
        assert seen["x-real-ip"] == proxy.outer_address, path


def test_visitors_behind_an_outer_proxy_have_own_limits_and_ipv6_visitors_by_network(proxy: Proxy, outer: str) -> None:
    def flood_of(addresses: list[str]) -> set[int]:
        return {reply.status_code for reply in at_once(outer, [(RENT, {"X-Says": one}) for one in addresses])}

    assert flood_of([f"203.0.113.{n % 200}" for n in range(600)]) == {200}
    assert flood_of(["203.0.113.201"] * 600) == {200, 429}
    assert flood_of([f"2001:db8:0:1::{n:x}" for n in range(600)]) == {200, 429}
    assert flood_of([f"2001:db8:1:{n:x}::1" for n in range(600)]) == {200}
    assert flood_of([f"::ffff:198.51.100.{n % 200}" for n in range(600)]) == {200}


def test_everything_works_below_a_path_of_an_outer_proxy(proxy: Proxy, outer: str) -> None:
    with httpx.Client(base_url=f"{outer}/orion", trust_env=False, timeout=60) as visitor:
        assert visitor.get("/terminal").headers["location"] == "/orion/terminal/"
        page = visitor.get("/terminal/")
        assert page.status_code == 200
        assert "/orion/api/openapi.json" in visitor.get("/").text
    with connect(f"{outer}/orion/api/rentals/abc/ssh".replace("http", "ws")) as shell:
        shell.send(b"below a path")
        assert shell.recv() == b"below a path"


def test_no_page_of_the_platform_has_an_address_that_a_path_prefix_would_break() -> None:
    for page in (ROOT / "web").rglob("*.*"):
        assert not re.search(r"""[("'`=]/[a-z.]""", page.read_text()), page


# The container


def test_the_log_is_json_with_the_request_id_and_without_secrets(proxy: Proxy, client: httpx.Client) -> None:
    secret_query = "token=hush-hush-query"
    reply = client.get(
        f"{REST}?{secret_query}", headers={**bearer(300), "Cookie": "hush-hush-cookie", "Referer": "http://hush-hush"}
    )
    identity = reply.headers["x-request-id"]
    wait_until(lambda: any(line["request_id"] == identity for line in proxy.access_log()), "the log has the request")
    line = next(line for line in proxy.access_log() if line["request_id"] == identity)
    assert (line["method"], line["path"], line["status"], line["client"]) == ("GET", REST, 200, f"{proxy.network}.1")
    assert client.get(f"/api/lost?{secret_query}").status_code == 502
    everything = proxy.logs()
    for secret in ("hush-hush", SECRET, token(300)):
        assert secret not in everything


def test_only_root_can_read_the_proxy_secret_and_other_users_serve_requests(proxy: Proxy) -> None:
    assert SECRET in proxy.exec("cat", "/run/orion-secret.conf").stdout
    for path in ("/run/orion-secret.conf", "/run/orion-proxy/secret", "/etc/orion-tls/tls.key"):
        assert proxy.exec("cat", path, user="www-data").returncode != 0
    users = proxy.exec("sh", "-c", "stat -c %U /proc/[0-9]*/").stdout.split()
    assert users.count("www-data") == 2


def test_the_proxy_s_container_is_read_only_and_its_workers_have_no_capability(proxy: Proxy) -> None:
    assert proxy.exec("touch", "/etc/nginx/nginx.conf").returncode != 0
    status = proxy.exec("sh", "-c", "grep -h -E '^(Uid|CapEff|NoNewPrivs)' /proc/[0-9]*/status").stdout.split("\n")
    workers = [status[i + 1] for i, line in enumerate(status) if line.startswith("Uid:\t33")]
    assert [line.split()[1].strip("0") for line in workers] == ["", ""]
    assert "NoNewPrivs:\t0" not in status


def test_the_health_check_of_the_proxy_passes(proxy: Proxy) -> None:
    wait_until(lambda: proxy.exec("healthcheck.sh").returncode == 0, "the check passes; Docker repeats it as well")


# The manager away. These come last: they take it away.


def test_the_proxy_reports_an_unreachable_manager_and_finds_it_again(proxy: Proxy, manager: EchoManager) -> None:
    manager.stop()
    for path in (HEARTBEAT, REST, "/healthz", "/r/aaaaaaaaaa/8000/"):
        reply = post(f"{proxy.url}{path}")
        assert_problem(reply, 502, "manager_unreachable")
        assert reply.headers["x-orion-manager"] == "unreachable"
    again = EchoManager(proxy.app_address)
    again.start()
    assert get(f"{proxy.url}{REST}").status_code == 200
    again.stop()


def test_the_certificate_outlives_a_restart_and_the_proxy_starts_without_the_manager(
    proxy: Proxy, manager: EchoManager
) -> None:
    manager.stop()
    before = certificate(proxy)
    proxy.compose("restart", "--timeout", "5", "manager_proxy")
    wait_until(proxy.answers, "the proxy answers again")
    assert certificate(proxy) == before
    assert_problem(get(f"{proxy.url}{REST}"), 502, "manager_unreachable")


@pytest.fixture
def own_certificate(tmp_path: Path) -> Path:
    names = ["-subj", "/CN=own", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", tmp_path / "tls.key", "-out", tmp_path / "tls.crt"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path


def test_a_proxy_without_a_manager_reports_that_in_time_and_uses_the_operator_s_certificate(
    own_certificate: Path,
) -> None:
    with new_proxy(app_host=77, tls_directory=own_certificate, trusts_outer=False) as lonely:
        lonely.give_secret()
        wait_until(lonely.answers, "the proxy answers")
        assert certificate(lonely) == (own_certificate / "tls.crt").read_text()
        assert "set_real_ip_from" not in lonely.exec("cat", "/run/orion-trusted.conf").stdout, "no address is trusted"
        for _ in range(2):
            reply = post(f"{lonely.url}{HEARTBEAT}")
            assert reply.status_code in {502, 504}
            assert_problem(reply, reply.status_code, "manager_unreachable")
            assert reply.headers["x-orion-manager"] == "unreachable"
            assert reply.elapsed.total_seconds() < 30, "Nginx itself would try for a minute"
