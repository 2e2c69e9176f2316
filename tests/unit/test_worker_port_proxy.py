"""The worker's port proxy: the owner of a port's socket, the check of tokens, and the bytes that are carried."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from orion_worker.freezer.marks import Freezer
from orion_worker.records import RentalRecord, RentalRecords
from orion_worker.web import port_proxy, socket_diag
from orion_worker.web.active_rentals import RunningRentals
from orion_worker.web.listeners import Listener, PortTarget, listeners, target_of
from orion_worker.web.port_proxy import PortProxy
from orion_worker.web.port_tokens import PortToken, end_signature, signature, take_token, token_from
from orion_worker.web.refusals import PortRefusal, refusal_response

from orion.manager.gateway import port_connections
from orion.manager.gateway.port_keys import signed_pass

SESSION = "5e55" * 8
TOKEN = PortToken(rental_id="abcd234567", epoch=3, port=8000)
RECORD = RentalRecord(rental_id="abcd234567", username="r-abcd234567", uid=100_001, epoch=3, activated=True)
OURS, ANOTHERS = 100_001, 100_002
WITHIN_S = 60.0


# The owner of a port


def table(*lines: tuple[str, int, int, int], state: str = "0A") -> str:
    """Return (address, port, uid, inode) lines in the form of /proc/net/tcp."""
    written = ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"]
    for address, port, uid, inode in lines:
        packed = ip_address(address).packed
        words = [f"{int.from_bytes(packed[at : at + 4], sys.byteorder):08X}" for at in range(0, len(packed), 4)]
        near = f"{''.join(words)}:{port:04X}"
        written.append(f"   0: {near} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {uid} 0 {inode} 1 0")
    return "\n".join(written) + "\n"


def reached(*lines: tuple[str, int, int, int]) -> PortTarget | None:
    v4 = table(*[line for line in lines if ":" not in line[0]])
    return target_of(listeners(v4, table(*[line for line in lines if ":" in line[0]])), OURS, 8000)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::ffff:127.0.0.1"])  # noqa: S104
def test_a_socket_of_the_rental_is_reached_where_it_listens(address: str) -> None:
    assert reached((address, 8000, OURS, 7)) == PortTarget(("127.0.0.1",), frozenset({7}))


def test_a_socket_on_ipv6_is_reached_by_ipv6_and_a_dual_one_by_either() -> None:
    assert reached(("::1", 8000, OURS, 7)) == PortTarget(("::1",), frozenset({7}))
    assert reached(("::", 8000, OURS, 7)) == PortTarget(("127.0.0.1", "::1"), frozenset({7}))


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (("127.0.0.1", 8001, OURS, 7),),
        (("127.0.0.1", 8000, ANOTHERS, 7),),
        (("127.0.0.1", 8000, 0, 7),),
        (("172.20.128.4", 8000, OURS, 7), ("10.0.0.1", 8000, OURS, 8)),
        (("127.0.0.2", 8000, OURS, 7),),
        # Others who could answer in its place.
        (("0.0.0.0", 8000, OURS, 7), ("127.0.0.1", 8000, ANOTHERS, 8)),  # noqa: S104
        (("127.0.0.1", 8000, OURS, 7), ("::", 8000, ANOTHERS, 8)),
        (("::1", 8000, ANOTHERS, 7), ("::", 8000, OURS, 8)),
    ],
)
def test_a_port_on_which_another_renter_could_answer_is_not_the_rental_s(
    lines: tuple[tuple[str, int, int, int], ...],
) -> None:
    assert reached(*lines) is None


def test_a_connection_from_a_port_is_no_listener() -> None:
    assert listeners(table(("127.0.0.1", 8000, OURS, 7), state="01"), "") == []


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), ("::", socket.AF_INET6)])
def test_netlink_and_proc_give_the_same_sockets(address: str, family: socket.AddressFamily) -> None:
    with socket.create_server((address, 0), family=family) as server:
        port = server.getsockname()[1]
        tables = [file.read_text() for file in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if file.exists()]
        inode = os.fstat(server.fileno()).st_ino  # another renter may listen on that port of another address
        [by_proc] = [each for each in listeners(*tables) if (each.port, each.inode) == (port, inode)]
        [by_netlink] = [each for each in socket_diag.listening() if (each.port, each.inode) == (port, inode)]
    assert (
        by_netlink == by_proc == Listener(address=ip_address(address), port=port, uid=os.geteuid(), inode=by_proc.inode)
    )


def test_a_kernel_without_netlink_diagnostics_is_read_by_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_diag, "SOCK_DIAG_BY_FAMILY", 77)
    with socket.create_server(("127.0.0.1", 0)) as server:
        inode = os.fstat(server.fileno()).st_ino
        assert [each.uid for each in socket_diag.listening() if each.inode == inode] == [os.geteuid()]


# Access tokens


def signed_token(token: PortToken = TOKEN, session: str = SESSION) -> str:
    return f"{token.text} {signature(session, token)}"


def test_a_token_of_the_session_is_accepted() -> None:
    assert token_from(signed_token(), SESSION) == TOKEN


@pytest.mark.parametrize(
    ("tried", "session"),
    [
        (signed_token(session="another"), SESSION),
        (signed_token(), "another"),
        (signed_token(session=""), ""),
        (signed_token().replace(" 3 ", " 4 "), SESSION),
        (signed_token().replace(" 8000 ", " 8001 "), SESSION),
        (signed_token().replace("abcd", "abce"), SESSION),
        (signed_token().upper(), SESSION),
        ("", SESSION),
        (f"../../etc/x 3 8000 {'0' * 64}", SESSION),
    ],
)
def test_any_other_token_of_a_port_is_refused(tried: str, session: str) -> None:
    with pytest.raises(PortRefusal) as refused:
        token_from(tried, session)
    assert refused.value.status == 403


def test_the_token_is_removed_from_the_request_that_the_renter_gets() -> None:
    head = b"GET /x HTTP/1.1\r\nHost: a\r\nx-orion-PASS: it\r\nX-Orion-Other: c\r\nAccept: b\r\n\r\n"
    assert take_token(head) == ("it", b"GET /x HTTP/1.1\r\nHost: a\r\nAccept: b\r\n\r\n")


@pytest.mark.parametrize("headers", [b"", b"X-Orion-Pass: a\r\nX-Orion-Pass: a\r\n", b"X-Orion-Pass : a\r\n" * 2])
def test_a_request_needs_exactly_one_token(headers: bytes) -> None:
    with pytest.raises(PortRefusal):
        take_token(b"GET / HTTP/1.1\r\n" + headers + b"\r\n")


def test_a_refusal_is_json_or_html() -> None:
    refusal = PortRefusal(503, "frozen", "still <now>")
    assert b"Retry-After: 2" in refusal_response(refusal, as_html=False)
    assert b'"code": "frozen"' in refusal_response(refusal, as_html=False)
    assert b"still &lt;now&gt;" in refusal_response(refusal, as_html=True)


# The rentals of this worker


def test_only_a_rental_that_is_here_at_that_epoch_activated_and_not_frozen_is_found(tmp_path: Path) -> None:
    active, records, freezer = (
        RunningRentals(tmp_path),
        RentalRecords(tmp_path / "var/lib/orion/rentals"),
        Freezer(tmp_path),
    )

    def refusal() -> str:
        try:
            assert active.find(TOKEN) == RECORD
        except PortRefusal as refused:
            return refused.code
        return ""

    assert refusal() == "not_here"
    for other in (replace(RECORD, activated=False), replace(RECORD, ending=True), replace(RECORD, epoch=4)):
        records.save(other)
        assert refusal() == "not_here", other
    records.save(RECORD)
    assert refusal() == ""
    freezer.mark(RECORD, frozenset())
    assert refusal() == "frozen"
    freezer.forget(RECORD.rental_id)
    freezer.set_lease(False)
    assert refusal() == "frozen"
    freezer.set_lease(True)
    assert refusal() == ""
    records.bury(RECORD)
    assert refusal() == "not_here"


# Requests and answers


class Stage:
    """A port proxy and a renter's server behind it, both on this machine's loopback."""

    def __init__(self, root: Path, slots: int) -> None:
        self.records = RentalRecords(root / "var/lib/orion/rentals")
        self.records.save(RECORD)
        (root / "run/orion").mkdir(parents=True)
        (root / "run/orion/session").write_text(SESSION)
        self.looks: list[PortTarget | None] = []
        here = frozenset({"127.0.0.1"})
        self.proxy = PortProxy(rentals=RunningRentals(root), peers=here, look=self._look, managers=here, slots=slots)
        self.received = b""
        self.says = b"HTTP/1.1 200 OK\r\n\r\nfirst "
        self.connections = 0
        self.gone = asyncio.Event()
        self.server_port = self.proxy_port = 0

    def _look(self, uid: int, port: int) -> PortTarget | None:
        assert (uid, port) == (RECORD.uid, self.server_port)
        return self.looks.pop(0) if self.looks else PortTarget(("127.0.0.1",), frozenset({7}))

    async def renter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(asyncio.IncompleteReadError):
            self.received = await reader.readuntil(b"\r\n\r\n")
        writer.write(self.says)
        while self.says.endswith(b"first ") and (part := await reader.read(100)):
            writer.write(part)
        self.gone.set()
        writer.close()

    async def ask(self, token: str, text: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy_port)
        writer.write(b"POST /x HTTP/1.1\r\nX-Orion-Pass: " + token.encode() + b"\r\nA: b\r\n\r\n" + text)
        return reader, writer

    async def tell(self, *over: str, number: int, session: str = SESSION) -> bytes:
        """Send the manager's message about ended grants; return the answer."""
        lines = "\n".join(over).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy_port)
        signed = f"X-Orion-End: {number} {end_signature(session, number, lines)}"
        writer.write(f"POST / HTTP/1.1\r\n{signed}\r\nContent-Length: {len(lines)}\r\n\r\n".encode() + lines)
        answer = await reader.read()
        writer.close()
        return answer

    @property
    def token(self) -> PortToken:
        return replace(TOKEN, port=self.server_port)


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Return the bytes that arrive until the connection is closed or reset."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


@asynccontextmanager
async def serving(root: Path, slots: int = 1) -> AsyncIterator[Stage]:
    stage = Stage(root, slots)
    async with asyncio.timeout(WITHIN_S):
        renter = await asyncio.start_server(stage.renter, "127.0.0.1", 0)
        listener = socket.create_server(("127.0.0.1", 0))
        stage.server_port, stage.proxy_port = renter.sockets[0].getsockname()[1], listener.getsockname()[1]
        serving = asyncio.create_task(stage.proxy.serve(listener))
        try:
            yield stage
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            renter.close()


async def test_bytes_pass_unchanged_in_both_directions_without_the_token(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        reader, writer = await stage.ask(signed_token(stage.token), b"one\0")
        assert await reader.readuntil(b"one\0") == b"HTTP/1.1 200 OK\r\nX-Orion-Door: 1\r\n\r\nfirst one\0"
        writer.write(b"two")
        assert await reader.readexactly(3) == b"two"
        assert stage.received == b"POST /x HTTP/1.1\r\nA: b\r\n\r\n"
        writer.close()
        await stage.gone.wait()


HTML = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n<p>"
NO_ANSWERS = [
    (b"", b"no_answer"),
    (b"HTTP/1.1 200 OK\r\nA: b\r\n", b"no_answer"),
    (b"HTTP/1.1 103 Early Hints\r\n\r\n", b"no_answer"),
    (b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n", b"no_answer"),
    (b"\n\n" + HTML, b"no_http"),
    (b"SSH-2.0-x\r\n", b"no_http"),
    (b"HTTP/1.1 20", b"no_http"),
    (b"x" * 5000, b"no_http"),
    (b"HTTP/1.1 103 Early Hints\r\n\r\n<script>" + HTML, b"no_http"),
    (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 30 + HTML, b"no_http"),
    (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 31_000 + b"\r\n\r\n", b"answer_head_too_large"),
    (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000, b"answer_head_too_large"),
]


@pytest.mark.parametrize(("says", "code"), NO_ANSWERS)
async def test_an_answer_that_is_not_http_is_not_forwarded(tmp_path: Path, says: bytes, code: bytes) -> None:
    async with serving(tmp_path) as stage:
        stage.says = says
        reader, writer = await stage.ask(signed_token(stage.token), b"end")
        answered = await reader.read()
        assert code in answered
        assert b"<" not in answered
        writer.close()


@pytest.mark.parametrize(
    "before",
    [
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n",
        b"HTTP/1.1 100 Continue\n\nHTTP/1.1 102 Processing\r\n\r\n",
    ],
)
async def test_interim_answers_are_dropped_and_the_answer_passes(tmp_path: Path, before: bytes) -> None:
    async with serving(tmp_path) as stage:
        stage.says = before + HTML
        reader, writer = await stage.ask(signed_token(stage.token))
        assert await reader.read() == b"HTTP/1.1 200 OK\r\nX-Orion-Door: 1\r\nContent-Length: 3\r\n\r\n<p>"
        writer.close()


async def test_a_listener_that_accepts_no_connection_is_reported(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        stage.looks = [PortTarget(("127.0.0.254",), frozenset({7}))]  # a refusal, because nothing listens there
        reader, writer = await stage.ask(signed_token(stage.token))
        assert b"not_accepted" in await reader.read()
        writer.close()


async def test_a_connection_ends_with_the_rentals_right_to_run_here(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        reader, writer = await stage.ask(signed_token(stage.token))
        await reader.readuntil(b"first ")
        stage.records.save(replace(RECORD, epoch=4))
        stage.proxy.look_again()
        assert await ended(reader) == b""
        await stage.gone.wait()
        writer.close()


ALICE, BOB = "client.a11ce.0123456789abcdef", "client.b0b.0123456789abcdef"


async def test_a_connection_ends_when_the_manager_says_that_its_grant_has_ended(tmp_path: Path) -> None:
    """The grant is an access token of a port, one of all ports, or `public`; connections of other grants go on."""
    async with serving(tmp_path) as stage:
        port = stage.server_port
        grants = ("public", ALICE, BOB)
        tokens = [replace(stage.token, grant=grant, number=number) for number, grant in enumerate(grants, 10)]
        readers = {}
        for token in tokens:
            readers[token.grant], _ = await stage.ask(signed_token(token))
            await readers[token.grant].readuntil(b"first ")
        is_open = await stage.tell(number=20)
        assert is_open.endswith("\n".join(sorted(f"abcd234567 {port} {grant}" for grant in grants)).encode())
        assert (await stage.tell(f"* * {ALICE}", number=21)).endswith(f"{BOB}\nabcd234567 {port} public".encode())
        assert await ended(readers[ALICE]) == b""
        assert (await stage.tell(f"abcd234567 {port} public", number=22)).endswith(f"{port} {BOB}".encode())
        assert await ended(readers["public"]) == b""
        assert (await stage.tell("abcd234567 1 public", number=23)).endswith(f"{port} {BOB}".encode())


async def test_the_manager_and_the_port_proxy_speak_the_same_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as stage:
        monkeypatch.setattr(port_connections, "PORT_PROXY_PORT", stage.proxy_port)
        token, tell = stage.token, port_connections.end_connections
        signed = signed_pass(SESSION, token.rental_id, token.epoch, token.port, ALICE, 10, None)
        reader, _ = await stage.ask(signed)
        await reader.readuntil(b"first ")
        assert await tell("127.0.0.1", SESSION, 11, []) == [f"{token.rental_id} {token.port} {ALICE}"]
        with pytest.raises(ValueError, match="403"):
            await tell("127.0.0.1", "another session", 12, [f"* * {ALICE}"])
        assert await tell("127.0.0.1", SESSION, 13, [f"* * {ALICE}"]) == []
        assert await ended(reader) == b""


async def test_a_token_that_was_in_transit_when_its_grant_ended_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        token = replace(stage.token, number=10)
        await stage.tell(f"abcd234567 {token.port} public", number=11)
        reader, _ = await stage.ask(signed_token(token))
        assert b'"ended"' in await reader.read()
        assert stage.connections == 0
        reader, _ = await stage.ask(signed_token(replace(token, number=12)))
        assert (await reader.readuntil(b"first ")).startswith(b"HTTP/1.1 200"), "the port was made public again since"


async def test_a_connection_ends_with_the_time_in_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as stage:
        reader, _ = await stage.ask(signed_token(replace(stage.token, grant=ALICE, left_ms=30_000)))
        await reader.readuntil(b"first ")
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "time", lambda: time.monotonic() + 30.0)
        assert await ended(reader) == b""
        await stage.gone.wait()


async def test_only_the_manager_of_this_session_ends_grants(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        token = stage.token
        reader, _ = await stage.ask(signed_token(token))
        await reader.readuntil(b"first ")
        assert b'"no_end"' in await stage.tell(f"abcd234567 {token.port} public", number=9, session="another")
        stage.proxy._managers = frozenset({"127.0.0.9"})
        assert b'"no_pass"' in await stage.tell(f"abcd234567 {token.port} public", number=9)
        assert list(stage.proxy._carried.values()) == [token]


async def test_a_port_that_another_renter_takes_during_the_connection_gets_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        for after in (None, PortTarget(("127.0.0.1",), frozenset({8}))):
            stage.looks = [PortTarget(("127.0.0.1",), frozenset({7})), after]
            reader, writer = await stage.ask(signed_token(stage.token), b"secret")
            assert b"nothing_listens" in await reader.read()
            writer.close()
        assert stage.received == b""


async def test_an_earlier_epoch_and_a_foreign_token_reach_no_process(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        for tried, code in (
            (signed_token(replace(stage.token, epoch=2)), b"not_here"),
            (signed_token(replace(stage.token, epoch=4)), b"not_here"),
            (signed_token(stage.token, session="of another worker"), b"no_pass"),
        ):
            reader, writer = await stage.ask(tried)
            assert code in await reader.read()
            writer.close()
        assert stage.connections == 0


async def test_a_rental_may_use_the_share_of_its_slot_in_the_connections_of_the_port_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_proxy, "ENOUGH", 4)
    monkeypatch.setattr(port_proxy, "ENOUGH_EACH", 1)
    async with serving(tmp_path, slots=2) as stage:
        stage.records.save(replace(RECORD, rental_id="zzzzzzzzzz", username="r-zzzzzzzzzz"))
        inside = [await stage.ask(signed_token(stage.token)) for _ in range(2)]
        for reader, _ in inside:
            await reader.readuntil(b"first ")
        reader, writer = await stage.ask(signed_token(stage.token))
        refused = await reader.read()
        assert b"too_many_connections" in refused
        assert b"have 2 connections open" in refused
        neighbour = await stage.ask(signed_token(replace(stage.token, rental_id="zzzzzzzzzz")))
        await neighbour[0].readuntil(b"first ")
        for _, one in [*inside, (reader, writer), neighbour]:
            one.close()


def test_each_slot_has_some_connections_however_many_slots_there_are() -> None:
    shares = [
        PortProxy(rentals=RunningRentals(), peers=frozenset(), slots=slots)._rental_limit for slots in (1, 2, 4, 256)
    ]
    assert shares == [200, 100, 50, 10]


async def test_a_peer_that_is_not_the_proxy_is_disconnected(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        stage.proxy._peers = stage.proxy._managers = frozenset({"127.0.0.9"})
        reader, writer = await stage.ask(signed_token(stage.token))
        assert await ended(reader) == b""
        writer.close()
        assert stage.connections == 0
