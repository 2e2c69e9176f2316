"""Tests of the load that connections of unknown clients put on the proxy, and of its effect on known clients."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, islice
from statistics import median

import httpx
import pytest
from platform_support import Platform
from proxy_support import Proxy, outer_proxy, wait_until
from support import http2

from bench.strangers import ATTACKS, HEADERS, MEMORY, addresses, attacking, counted_kib, open_from
from orion.manager.api.bodies import UNKNOWN_WITHIN_S, WHOLE_WITHIN_S
from orion.manager.api.event_streams import MAX_STREAMS_PER_TOKEN

CONNECTION_KIB, REQUEST_KIB = 70, 64
"""The most memory of one connection in KiB, by the calculation in manager_proxy/limits.conf."""
SAMPLE = 300
"""Connections at a time of which the memory is measured: fewer than one visitor may have."""
LARGE_FILE = "/terminal/xterm/xterm.js"


def address(proxy: Proxy, port: int = 80) -> tuple[str, int]:
    """Return the proxy's own address, without a port that Docker might forward."""
    return f"{proxy.network}.2", port


def memory_kib(proxy: Proxy) -> float:
    return counted_kib(proxy.exec(*MEMORY).stdout)


def workers_of_nginx(proxy: Proxy) -> list[str]:
    found = proxy.exec("sh", "-c", "grep -l '[n]ginx: worker' /proc/[0-9]*/cmdline").stdout
    return sorted(found.split())


def room(proxy: Proxy) -> int:
    """Return the most concurrent requests, which the proxy logs at its start."""
    found = re.findall(r"room for (\d+) requests", proxy.logs())
    return int(found[-1])


# Kinds of connection: each is opened, and then takes as much memory as it can


def unfinished_headers(attacked: Platform) -> socket.socket:
    there = socket.create_connection(address(attacked.proxy), timeout=30)
    there.sendall(HEADERS)
    return there


def unfinished_headers_by_tls(attacked: Platform) -> socket.socket:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    there = context.wrap_socket(socket.create_connection(address(attacked.proxy, 443), timeout=30))
    there.sendall(HEADERS)
    return there


def unfinished_body(attacked: Platform) -> socket.socket:
    """Begin a body of a known caller, for which the manager waits."""
    there = socket.create_connection(address(attacked.proxy), timeout=30)
    head = f"POST /api/rent HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {attacked.secrets.admin_token}\r\n"
    there.sendall(f"{head}Content-Length: 16000\r\n\r\n{'a' * 15_000}".encode())
    return there


def unread_answer(attacked: Platform) -> socket.socket:
    there = socket.socket()
    there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    there.connect(address(attacked.proxy))
    there.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % LARGE_FILE.encode())
    return there


STREAMS = 20


def unread_streams(attacked: Platform) -> socket.socket:
    """HTTP/2, with a window of nothing: the answers of many requests wait in the proxy."""

    fields = [(":method", "GET"), (":scheme", "http"), (":path", LARGE_FILE), (":authority", "x")]
    fields += [(f"x-{number}", "a" * 3500) for number in range(4)]
    there = socket.create_connection(address(attacked.proxy), timeout=30)
    no_window = b"\x00\x04\x00\x00\x00\x00"
    there.sendall(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0, no_window))
    for number in range(STREAMS):
        there.sendall(http2.headers(fields, 2 * number + 1, ends=True))
    return there


KINDS: dict[str, tuple[Callable[[Platform], socket.socket], int, int]] = {
    "unfinished headers": (unfinished_headers, SAMPLE, CONNECTION_KIB),
    "unfinished headers by TLS": (unfinished_headers_by_tls, SAMPLE, CONNECTION_KIB),
    "unfinished bodies": (unfinished_body, SAMPLE, CONNECTION_KIB + REQUEST_KIB),
    "answers that the client does not read": (unread_answer, SAMPLE, CONNECTION_KIB + REQUEST_KIB),
    "streams that the client does not read": (
        unread_streams,
        SAMPLE // STREAMS,
        CONNECTION_KIB + STREAMS * REQUEST_KIB,
    ),
}
"""How one is opened, how many are, and the KiB that one may take."""


@pytest.mark.parametrize("kind", KINDS)
def test_no_connection_takes_more_memory_than_the_proxy_reserves_for_it(
    attacked: Platform, kind: str, record_property: Callable[[str, object], None]
) -> None:
    opened, number, most_kib = KINDS[kind]
    proxy = attacked.proxy
    # New workers, which have not allocated any memory that they keep.
    former = workers_of_nginx(proxy)
    assert proxy.exec("sh", "-c", "kill -HUP $(cat /run/nginx.pid)").returncode == 0
    wait_until(
        lambda: len(now := workers_of_nginx(proxy)) == 2 and not set(now) & set(former), "new workers have begun"
    )
    with ExitStack() as before:
        for _ in range(4):
            before.enter_context(opened(attacked))
        time.sleep(1)
    before_kib = memory_kib(proxy)
    with ExitStack() as open_ones:
        for _ in range(number):
            open_ones.enter_context(opened(attacked))
        time.sleep(1)
        taken_kib = (memory_kib(proxy) - before_kib) / number
    record_property("KiB each", round(taken_kib))
    assert 0 < taken_kib <= most_kib


# An attack

TRUSTED, LIKE_A_WORKER = 50, 51
"""The last parts of two addresses in orion_net: of an outer proxy that is trusted, and of one that is not."""


class LegitimateUser:
    """A visitor behind an outer proxy, with an open session and calls, and the longest duration of either."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.longest_call_s = 0.0
        self.calls = 0
        self.faults: list[str] = []
        self._ending = threading.Event()

    def call(self) -> None:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=60, headers={"X-Says": "203.0.113.9"}) as http:
            while not self._ending.wait(0.1):
                began = time.monotonic()
                try:
                    status = http.get("/healthz", headers={"Connection": "close"}).status_code
                except httpx.TransportError as error:
                    self.faults.append(repr(error))
                    continue
                self.longest_call_s = max(self.longest_call_s, time.monotonic() - began)
                self.calls += 1
                if status != 200:
                    self.faults.append(str(status))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        thread = threading.Thread(target=self.call, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ending.set()
            thread.join(90)


@pytest.fixture
def unknown_rentals() -> Iterator[tuple[str, ...]]:
    with addresses(8) as made:
        yield made


LASTS_S = 6
"""Seconds. Without a limit, Nginx was killed for its memory after 8 s; the most memory is taken after two."""


def under(
    attack: str, attacked: Platform, sources: Sequence[str], caller: int, at_least: int
) -> tuple[int, dict[str, float]]:
    """Run an attack while a visitor behind an outer proxy, with this last part of its address, makes calls.

    Assert that at one moment the attack has more connections than `at_least`, that no session is cut, no worker of
    Nginx is killed, and no call of the visitor fails or is refused. Return the number of the attack's connections (the
    median, because they come and go), and more figures.
    """
    proxy, name = attacked.proxy, f"during-{attack}-{caller}"
    before = workers_of_nginx(proxy)
    assert len(before) == 2
    limit_kib = int(re.findall(r"in (\d+) MiB", proxy.logs())[-1]) * 1024
    with outer_proxy(proxy, caller) as url, attacked.client() as admin:
        stream = admin.stream("GET", "/api/events", headers={"Accept": "text/event-stream"})
        someone = LegitimateUser(url)
        with stream as events, someone.at_work():
            lines = events.iter_lines()
            next(lines)
            wait_until(lambda: someone.calls > 5, "calls are answered before the attack")
            most_kib, opened, began = 0.0, [0], time.monotonic()
            with attacking(ATTACKS[attack], address(proxy), sources) as attackers:
                while time.monotonic() < began + LASTS_S or not attackers.has_tried_all or max(opened) <= at_least:
                    assert time.monotonic() < began + 60, f"the attack has at most {max(opened)} connections"
                    most_kib = max(most_kib, memory_kib(proxy))
                    opened.append(open_from(sources, proxy.exec("cat", "/proc/net/tcp").stdout))
                    time.sleep(0.3)
            attacked.token(name)
            assert next(line for line in lines if name in line), "the stream of events continues"
    assert not someone.faults, someone.faults[:5]
    assert workers_of_nginx(proxy) == before, "none was killed"
    assert most_kib < limit_kib / 2
    return round(median(opened)), {"MiB": most_kib // 1024, "longest call in s": someone.longest_call_s}


@pytest.mark.parametrize("attack", ATTACKS)
def test_thousands_of_connections_of_an_unknown_client_cut_no_session_and_leave_memory(
    attacked: Platform, unknown_rentals: tuple[str, ...], attack: str, record_property: Callable[[str, object], None]
) -> None:
    connections, figures = under(attack, attacked, unknown_rentals[:1], TRUSTED, 10)
    record_property("cost", {"connections": connections} | figures)
    assert connections <= room(attacked.proxy) // 4


@pytest.mark.parametrize("attack", ATTACKS)
def test_unknown_clients_of_many_addresses_block_no_worker_and_leave_memory(
    attacked: Platform, unknown_rentals: tuple[str, ...], attack: str, record_property: Callable[[str, object], None]
) -> None:
    """Allow that they block new clients, but no client that is already connected."""
    # A large body of an unknown client is refused at once: the number depends on the attacker's speed.
    at_least = room(attacked.proxy) // (8 if attack == "large-bodies" else 4)
    connections, figures = under(attack, attacked, unknown_rentals, LIKE_A_WORKER, at_least)
    record_property("cost", {"connections": connections} | figures)
    assert connections <= room(attacked.proxy) * 7 // 8


def requests_of_nothing(number: int) -> bytes:
    fields = [(":method", "GET"), (":scheme", "http"), (":path", "/api/rentals"), (":authority", "x")]
    streams = range(number + 1, number + 101, 2)
    return b"".join(http2.headers(fields, stream, ends=True) + http2.reset(stream) for stream in streams)


FRAMES: dict[str, Callable[[int], bytes]] = {
    "requests that are taken back": requests_of_nothing,
    "headers that go on": lambda _: (
        http2.frame(http2.HEADERS, 1, 1, b"\0\x01x\x01y") + http2.frame(9, 0, 1, b"a" * 4100) * 10
    ),
    "settings": lambda _: http2.frame(http2.SETTINGS, 0, 0, b"\0\x04\0\0\xff\xff") * 200,
    "pings": lambda _: http2.frame(6, 0, 0, b"12345678") * 200,
    "priorities": lambda _: http2.frame(2, 0, 1, b"\0\0\0\0\x10") * 200,
}
"""Endless frames that a client of HTTP/2 may send, by the number of bytes already sent."""


@pytest.mark.parametrize("kind", FRAMES)
def test_endless_http_2_frames_disturb_no_other_client_and_take_no_memory(
    attacked: Platform, unknown_rentals: tuple[str, ...], kind: str
) -> None:
    proxy, ending, sent = attacked.proxy, threading.Event(), list[int]()

    def send() -> None:
        while not ending.is_set():
            with suppress(OSError), socket.create_connection(address(proxy), 5, (unknown_rentals[0], 0)) as there:
                there.sendall(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0))
                while not ending.is_set():
                    there.sendall(FRAMES[kind](100 * len(sent)))
                    sent.append(1)

    before, before_kib = workers_of_nginx(proxy), memory_kib(proxy)
    with outer_proxy(proxy) as url, ThreadPoolExecutor(4) as attackers:
        someone = LegitimateUser(url)
        with someone.at_work():
            attacks = [attackers.submit(send) for _ in range(4)]
            try:
                time.sleep(2)
                wait_until(lambda: someone.calls > 10 and len(sent) > 100, "calls are answered while frames come", 60)
            finally:
                ending.set()
            for each in attacks:
                each.result(30)
    assert not someone.faults, someone.faults[:5]
    assert workers_of_nginx(proxy) == before, "none was killed"
    assert memory_kib(proxy) - before_kib < 32 * 1024


def event_streams(attacked: Platform, source: str) -> Iterator[socket.socket]:
    """Yield streams of events that are being opened. Unlike an unfinished body, such a request has no time limit."""
    for number in count():
        token = attacked.token(f"many-{number}")
        for _ in range(MAX_STREAMS_PER_TOKEN):
            there = socket.create_connection(address(attacked.proxy), timeout=30, source_address=(source, 0))
            head = f"GET /api/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            there.sendall(f"{head}Accept: text/event-stream\r\n\r\n".encode())
            yield there


def test_a_visitor_at_its_limit_of_requests_gets_an_error_that_names_the_limit(
    attacked: Platform, unknown_rentals: tuple[str, ...]
) -> None:
    proxy, source = attacked.proxy, unknown_rentals[0]
    by_it = httpx.HTTPTransport(local_address=source)
    url = f"http://{proxy.network}.2"
    with ExitStack() as open_ones, httpx.Client(base_url=url, transport=by_it, timeout=60) as http:
        streams = event_streams(attacked, source)
        for stream in islice(streams, room(proxy) // 5):
            open_ones.enter_context(stream)

        def is_refused() -> bool:
            """Return whether a call is refused. One that is answered frees its place, which the next stream takes."""
            open_ones.enter_context(next(streams))
            return http.get("/api/rentals").status_code == 429

        wait_until(is_refused, "as many requests as may be are in progress")
        answer = http.get("/api/rentals")
        assert answer.json()["code"] == "too_many_connections"
        assert "too many requests from your address are in progress" in answer.json()["detail"]
        assert attacked.worker_health() == "ready"


@pytest.mark.parametrize(
    ("is_known", "status", "code", "within_s"),
    [(True, 408, b"request_timeout", WHOLE_WITHIN_S), (False, 401, b"unauthorized", UNKNOWN_WITHIN_S)],
)
def test_the_timeout_of_a_body_counts_for_the_whole_body(
    attacked: Platform, is_known: bool, status: int, code: bytes, within_s: float
) -> None:
    there = socket.create_connection(address(attacked.proxy), timeout=60)
    token = attacked.token("slow") if is_known else "none"
    began = time.monotonic()
    with there:
        head = f"POST /api/rent HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 1000\r\n\r\n{{"
        there.sendall(head.encode())
        there.settimeout(1.0)
        received = b""
        while code not in received and time.monotonic() < began + 4 * WHOLE_WITHIN_S:
            there.sendall(b" ")
            try:
                received += there.recv(65536)
            except TimeoutError:
                continue
    assert received.startswith(b"HTTP/1.1 %d " % status)
    assert code in received
    assert time.monotonic() - began >= within_s - 0.5


def test_the_proxy_refuses_to_start_with_too_little_memory(attacked: Platform) -> None:
    small = ["docker", "run", "--rm", "--memory", "200m", attacked.proxy.image()]
    done = subprocess.run(small, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ORION_PROXY_MEMORY is too small: 200m, and manager_proxy needs" in done.stderr
