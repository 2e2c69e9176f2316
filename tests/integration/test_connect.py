"""`orion connect` as a real process with a real WebSocket server, and a TCP server in place of sshd."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import ssl
import subprocess
import sys
import tty
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.scripted_platform import HOST_KEY, ScriptedPlatform, rental
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from orion.errors import OrionError
from orion.ssh_client import connect, hosts
from orion.ssh_client.connect import SAY_EVERY_S, TIDY

Relay = Callable[[ServerConnection], Awaitable[None]]
TOKEN = "orion_client_t1_secret"
ALL_BYTES = bytes(range(256))


@asynccontextmanager
async def platform(relay: Relay, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Run a WebSocket server that accepts our token at the path of the contract, and yield its port."""

    def admit(connection: ServerConnection, request: Request) -> Response | None:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return refusal(connection, HTTPStatus.UNAUTHORIZED, "the token is unknown")
        if request.path.partition("?")[0] != "/api/rentals/abcdefgh23/ssh":
            return refusal(connection, HTTPStatus.NOT_FOUND, "there is no such\x1b[31m rental")
        return None

    async with serve(
        relay, "127.0.0.1", 0, process_request=admit, compression=None, close_timeout=0.2, ssl=context
    ) as server:
        yield server.sockets[0].getsockname()[1]


def refusal(connection: ServerConnection, status: HTTPStatus, detail: str) -> Response:
    body = f'{{"title": "Refused", "status": {status.value}, "code": "some_code", "detail": "{detail}"}}'
    reply = connection.respond(status, body.replace("\x1b", "\\u001b"))
    reply.headers["X-Request-ID"] = "req1"
    return reply


async def echo(connection: ServerConnection) -> None:
    """Copy frames to a TCP connection and back, and close both, as the gateway does."""
    server = await asyncio.start_server(_echo_bytes, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        await asyncio.gather(_to_tcp(connection, writer), _from_tcp(connection, reader))


async def _echo_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back all bytes. End the connection, as sshd does, after a byte 0xff at the end of a read."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
        if data.endswith(b"END\xff"):
            break
    writer.close()


async def _to_tcp(connection: ServerConnection, writer: asyncio.StreamWriter) -> None:
    try:
        async for message in connection:
            assert isinstance(message, bytes)
            writer.write(message)
            await writer.drain()
    except (ConnectionClosed, ConnectionError):
        pass
    writer.close()


async def _from_tcp(connection: ServerConnection, reader: asyncio.StreamReader) -> None:
    while data := await reader.read(65536):
        await connection.send(data)
    await connection.close()


async def run(
    port: int, given: bytes, *, rental_id: str = "abcdefgh23", token: str = TOKEN, scheme: str = "http", ca: str = "",
    host: str = "localhost", **environment: str,
) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
    process = await start(port, rental_id=rental_id, token=token, scheme=scheme, ca=ca, host=host, **environment)
    out, err = await asyncio.wait_for(process.communicate(given), 60)
    return subprocess.CompletedProcess([], process.returncode or 0, out, err)


async def start(
    port: int, *, rental_id: str = "abcdefgh23", token: str = TOKEN, scheme: str = "http", ca: str = "",
    host: str = "localhost", stderr: int = subprocess.PIPE, stdin: int = subprocess.PIPE, by: tuple[str, ...] = (),
    **more: str,
) -> asyncio.subprocess.Process:  # fmt: skip
    reading, writing = os.pipe()
    os.write(writing, token.encode())
    os.close(writing)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "ORION_URL": f"{scheme}://{host}:{port}",
        "ORION_TOKEN_FILE": f"/dev/fd/{reading}",
        "ORION_CA_FILE": ca,
        # This forward proxy does not exist; a connection to this machine does not use it.
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        **more,
    }
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(*by, sys.executable, "-P", "-m", "orion.connect", rental_id),
        stdin=stdin, stdout=pipe, stderr=stderr, env=environment, pass_fds=[reading],
    )  # fmt: skip
    os.close(reading)
    return process


async def test_bytes_of_every_value_come_back_unchanged() -> None:
    sent = ALL_BYTES * 8192 + b"END\xff"
    async with platform(echo) as port:
        done = await run(port, sent)
    assert done.stdout == sent
    assert (done.returncode, done.stderr) == (0, b"")


async def test_bytes_of_the_worker_after_the_end_of_stdin_are_still_delivered() -> None:
    async def late(connection: ServerConnection) -> None:
        request = await connection.recv()
        for number in range(100):
            await connection.send(f"{number} {request!r}\n".encode())

    async with platform(late) as port:
        done = await run(port, b"hello")
    assert done.stdout.count(b"hello") == 100
    assert done.returncode == 0


async def test_the_relay_ends_with_the_other_side_though_stdin_is_open() -> None:
    async def bye(connection: ServerConnection) -> None:
        await connection.send(b"bye")

    async with platform(bye) as port:
        process = await start(port)
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.read(), 60) == b"bye"
        assert await process.wait() == 0


async def test_the_relay_ends_with_the_reader_of_its_stdout() -> None:
    closed = asyncio.Event()

    async def flood(connection: ServerConnection) -> None:
        try:
            while True:
                await connection.send(b"x" * 65536)
        except ConnectionClosed:
            closed.set()

    async with platform(flood) as port:
        process = await start(port)
        assert process.stdout is not None
        await process.stdout.readexactly(1)
        process.stdout._transport.close()  # type: ignore[attr-defined]
        assert await asyncio.wait_for(process.wait(), 60) == 0
        await asyncio.wait_for(closed.wait(), 60)


async def test_the_relay_receives_no_more_than_its_reader_reads() -> None:
    sent = 0
    stalled = asyncio.Event()

    async def flood(connection: ServerConnection) -> None:
        nonlocal sent
        while not stalled.is_set():
            try:
                await asyncio.wait_for(connection.send(b"x" * 65536), 0.3)
                sent += 65536
            except TimeoutError:
                stalled.set()

    async with platform(flood) as port:
        process = await start(port)
        await asyncio.wait_for(stalled.wait(), 60)
        process.kill()
        await process.communicate()
    assert sent < 32 << 20


async def test_the_relay_sends_no_more_than_the_other_side_reads() -> None:
    released = asyncio.Event()

    async def deaf(_connection: ServerConnection) -> None:
        await released.wait()

    async with platform(deaf) as port:
        process = await start(port)
        assert process.stdin is not None
        given = 0
        with suppress(TimeoutError):
            while given < 32 << 20:
                process.stdin.write(b"x" * 65536)
                await asyncio.wait_for(process.stdin.drain(), 0.3)
                given += 65536
        process.kill()
        await process.communicate()
        released.set()
    assert given < 32 << 20


@pytest.mark.parametrize(
    ("rental_id", "token", "status", "said"),
    [
        ("abcdefgh23", "orion_client_t2_wrong", 4, b"orion: the token is unknown\n"),
        ("another234", TOKEN, 3, b"orion: there is no such [31m rental\n"),
    ],
)
async def test_a_refusal_is_one_harmless_line(rental_id: str, token: str, status: int, said: bytes) -> None:
    async with platform(echo) as port:
        done = await run(port, b"", rental_id=rental_id, token=token)
    assert (done.returncode, done.stderr) == (status, said)
    assert done.stdout == b""


async def test_an_unreachable_worker_is_reported_with_the_servers_message() -> None:
    async def lost(connection: ServerConnection) -> None:
        await connection.close(1011, "worker w-aaaa2222 cannot be reached")

    async with platform(lost) as port:
        done = await run(port, b"")
    assert (done.returncode, done.stderr) == (1, b"orion: worker w-aaaa2222 cannot be reached\n")


async def test_a_refused_connection_is_reported_with_advice() -> None:
    async with platform(echo) as port:
        pass
    done = await run(port, b"")
    assert done.returncode == 5
    assert b"connection refused" in done.stderr
    assert done.stderr.count(b"\n") == 1


async def test_text_frames_are_not_bytes_of_ssh() -> None:
    async def chatty(connection: ServerConnection) -> None:
        await connection.send("hello")
        await connection.wait_closed()

    async with platform(chatty) as port:
        done = await run(port, b"")
    assert (done.stdout, done.returncode) == (b"", 1)


@pytest.mark.parametrize("arguments", [[], ["../tokens"]])
def test_orion_connect_accepts_exactly_one_id(arguments: list[str]) -> None:
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "ORION_URL": "http://localhost:1",
        "ORION_TOKEN_FILE": "/dev/null",
    }
    done = subprocess.run(
        [sys.executable, "-m", "orion.connect", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {2, 4}
    assert done.stderr.startswith("orion: ")
    assert "Traceback" not in done.stderr


async def test_tls_is_verified_and_a_given_certificate_is_enough(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    async with platform(echo, context) as port:
        trusted = await run(port, b"END\xff", scheme="https", ca=str(certificate))
        unknown = await run(port, b"END\xff", scheme="https")
    assert (trusted.stdout, trusted.returncode) == (b"END\xff", 0)
    assert (unknown.stdout, unknown.returncode) == (b"", 5)
    assert b"--ca-file" in unknown.stderr


async def test_a_forward_proxy_gets_only_connections_to_the_platform() -> None:
    asked: list[bytes] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        there, back = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with suppress(ConnectionError):
            await asyncio.gather(_pour(reader, back), _pour(there, writer))

    async with platform(echo) as port, await asyncio.start_server(forward, "127.0.0.1", 0) as proxy:
        address = f"http://somebody:se%20cret@127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        done = await run(port, b"END\xff", host="platform.example", http_proxy=address)
    assert (done.stdout, done.returncode) == (b"END\xff", 0), done.stderr
    assert asked[0].startswith(f"CONNECT platform.example:{port} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic c29tZWJvZHk6c2UgY3JldA==\r\n" in asked[0]
    assert TOKEN.encode() not in asked[0]


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(65536):
        writer.write(part)
    writer.close()


async def test_a_report_says_how_the_session_ended(tmp_path: Path) -> None:
    report = tmp_path / "report"
    async with platform(migrated) as port:
        lost = await run(port, b"", ORION_CONNECT_REPORT=str(report))
    ended = json.loads(report.read_text())
    assert (ended["lost"], ended["there"]) == (True, True)
    assert ended["reason"].endswith("its worker is down")
    assert lost.stderr == b"", "the reader of the report prints it"
    async with platform(echo) as port:
        await run(port, b"END\xff", ORION_CONNECT_REPORT=str(report))
    assert json.loads(report.read_text())["lost"] is False, "stdin had ended: it was ssh's own end"


async def test_the_relay_tries_a_worker_again_that_does_not_answer_yet() -> None:
    tries = 0

    def not_yet(connection: ServerConnection, _request: Request) -> Response | None:
        nonlocal tries
        tries += 1
        if tries > 2:
            return None
        reply = connection.respond(HTTPStatus.BAD_GATEWAY, '{"code": "worker_unreachable", "detail": "no answer"}')
        reply.headers["Content-Type"] = "application/problem+json"
        return reply

    async with serve(echo, "127.0.0.1", 0, process_request=not_yet, compression=None, close_timeout=0.2) as server:
        done = await run(server.sockets[0].getsockname()[1], b"END\xff")
    assert (done.stdout, done.returncode) == (b"END\xff", 0)
    assert_waited(done.stderr, "no answer")


def assert_waited(stderr: bytes, reason: str) -> None:
    """Assert that the reason was printed at once, and again at most every five seconds."""
    first, *again = stderr.decode().splitlines()
    assert first == f"orion: {reason}; waiting"
    for number, line in enumerate(again, 1):
        waited = re.fullmatch(rf"orion: {re.escape(reason)}; waiting \((\d+) s\)", line)
        assert waited, line
        assert int(waited[1]) >= SAY_EVERY_S * number, line


async def migrated(connection: ServerConnection) -> None:
    """Begin a session, then close it because the rental leaves its worker."""
    await connection.send(b"SSH-2.0-x\r\n")
    await connection.close(4001, "its worker is down")


async def test_the_relay_waits_for_a_migrating_rental_and_shows_the_reason_at_once() -> None:
    asked: list[str] = []

    def not_yet(connection: ServerConnection, request: Request) -> Response | None:
        asked.append(request.path.partition("?")[2])
        if len(asked) > 3:
            return None
        reply = connection.respond(HTTPStatus.CONFLICT, '{"code": "not_active", "detail": "it is queued: no slot"}')
        reply.headers["Retry-After"] = "5"
        return reply

    async with serve(echo, "127.0.0.1", 0, process_request=not_yet, compression=None, close_timeout=0.2) as server:
        done = await run(server.sockets[0].getsockname()[1], b"END\xff")
    assert (done.stdout, done.returncode) == (b"END\xff", 0)
    assert_waited(done.stderr, "it is queued: no slot")
    assert asked == ["wait_s=0", "wait_s=5", "wait_s=5", "wait_s=5"], "the reason, then a message every 5 s"


async def test_the_relay_does_not_wait_for_an_ended_rental() -> None:
    def over(connection: ServerConnection, _request: Request) -> Response:
        return connection.respond(HTTPStatus.CONFLICT, '{"code": "not_active", "detail": "it is released"}')

    async with serve(echo, "127.0.0.1", 0, process_request=over, compression=None, close_timeout=0.2) as server:
        done = await run(server.sockets[0].getsockname()[1], b"")
    assert (done.returncode, done.stderr) == (6, b"orion: it is released\n")


async def test_the_relay_shows_a_notice_of_the_platform() -> None:
    def noticed(_connection: ServerConnection, _request: Request, response: Response) -> None:
        response.headers["X-Orion-Notice"] = "box is not copied: it is frozen\x85[2J"

    async with serve(echo, "127.0.0.1", 0, process_response=noticed, compression=None, close_timeout=0.2) as server:
        done = await run(server.sockets[0].getsockname()[1], b"END\xff")
    assert (done.stdout, done.stderr) == (b"END\xff", b"orion: box is not copied: it is frozen [2J\n")


REMARKED = b"orion: box: its home holds 9.0 MB of 10.0 MB [2J\n"


@pytest.mark.parametrize(
    ("stdin_of_ssh", "said_before", "shown"),
    [("a terminal", {}, REMARKED), ("a pipe", {}, b""), ("a terminal", {"ORION_CONNECT_SAID": "1"}, b"")],
)
async def test_a_note_is_shown_once_at_a_log_in_and_never_to_scp_or_rsync(
    stdin_of_ssh: str, said_before: dict[str, str], shown: bytes
) -> None:
    """Use a pipe as the stdin of ssh, as every program that copies files does."""

    def remarked(_connection: ServerConnection, _request: Request, response: Response) -> None:
        response.headers["X-Orion-Remark"] = "box: its home holds 9.0 MB of 10.0 MB\x85[2J"

    ours, terminal = pty.openpty()
    in_place_of_ssh = ("sh", "-c", 'printf "END\\377" | "$@"; :', "sh")
    stdin = terminal if stdin_of_ssh == "a terminal" else subprocess.PIPE
    async with serve(echo, "127.0.0.1", 0, process_response=remarked, compression=None, close_timeout=0.2) as server:
        port = server.sockets[0].getsockname()[1]
        process = await start(port, by=in_place_of_ssh, stdin=stdin, **said_before)
        out, err = await asyncio.wait_for(process.communicate(), 60)
    os.close(ours)
    os.close(terminal)
    assert (out, err) == (b"END\xff", shown)


async def test_a_worker_lost_before_its_first_byte_is_replaced_by_the_next_in_the_same_session() -> None:
    """Act as a paused worker, which accepts connections and sends nothing. ssh does not notice the other worker."""
    sessions = 0
    continued = asyncio.Event()

    async def first_silent(connection: ServerConnection) -> None:
        nonlocal sessions
        sessions += 1
        if sessions > 1:
            return await echo(connection)
        assert await connection.recv() == b"SSH-2.0-a END\xff"
        await asyncio.wait_for(continued.wait(), 60)
        return await connection.close(4001, "its worker is down")

    async with platform(first_silent) as port:
        process = await start(port)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"SSH-2.0-a END\xff")
        said = await asyncio.wait_for(process.stderr.readline(), 60)
        assert said == b"orion: its worker does not answer yet; waiting\n"
        continued.set()
        assert await asyncio.wait_for(process.stdout.read(), 60) == b"SSH-2.0-a END\xff"
        assert await process.wait() == 0
        said = await process.stderr.read()
    assert said == b"orion: the rental is not on that worker any more: its worker is down; waiting\n"


@pytest.mark.parametrize("raw", [True, False])
async def test_a_lost_session_leaves_the_terminal_in_order(raw: bool) -> None:
    """ssh has set the terminal to raw mode, in which a line feed alone does not go back to the left."""
    ours, theirs = pty.openpty()
    if raw:
        tty.setraw(theirs)
    async with platform(migrated) as port:
        process = await start(port, stderr=theirs)
        os.close(theirs)
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.read(), 60) == b"SSH-2.0-x\r\n"
        assert process.stdin is not None
        process.stdin.write(b"what ssh still says finds a reader")
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), 60) == 1
    said = b""
    with suppress(OSError):  # a terminal without a writer raises OSError
        while part := os.read(ours, 1000):
            said += part
    os.close(ours)
    line = b"orion: the rental is not on that worker any more: its worker is down\r\n"
    assert said == (TIDY.encode() if raw else b"") + line


def test_the_reason_for_waiting_is_shown_every_five_seconds_and_is_in_the_final_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0

    class SteppedClock:
        monotonic = staticmethod(lambda: now)
        sleep = staticmethod(lambda _seconds: None)

    monkeypatch.setattr(connect, "time", SteppedClock)
    patience, reason = connect.Patience(), OrionError("it is queued: no slot")
    for seconds in range(13):
        now = 1000.0 + seconds
        patience.wait_after(reason)
    patience.wait_after(OrionError("it is on the move"))
    assert capsys.readouterr().err.splitlines() == [
        "orion: it is queued: no slot; waiting",
        "orion: it is queued: no slot; waiting (5 s)",
        "orion: it is queued: no slot; waiting (10 s)",
        "orion: it is on the move; waiting (12 s)",
    ]
    now = 1000.0 + connect.KEEP_TRYING_S + 1
    with pytest.raises(OrionError, match="no slot"):
        patience.wait_after(reason)


CERTIFICATE = "ssh-ed25519-cert-v01@openssh.com AAAAIHNzaC1lZDI1NTE5"


@pytest.fixture
def certifying(tmp_path: Path) -> Iterator[ScriptedPlatform]:
    """Make our own key in the folder, and yield a platform that signs a certificate for it."""
    (tmp_path / "orion").mkdir()
    (tmp_path / "orion/id_ed25519.pub").write_text(f"{HOST_KEY} orion\n")
    made = ScriptedPlatform()
    signed = {"certificate": CERTIFICATE, "expires_at": "2130-01-01T00:00:00Z"}
    made.answer("POST", "/api/rentals/abcdefgh23/certificate", signed)
    yield made
    made.stop()


async def certified(platform: ScriptedPlatform, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run the command that ssh runs before it logs in to a rental whose key this machine does not have."""
    port = urlsplit(platform.url).port or 0
    return await run(port, b"", rental_id="--certify=abcdefgh23", host="127.0.0.1", XDG_CONFIG_HOME=str(folder))


async def test_a_certificate_waits_for_a_queued_or_migrating_rental(
    certifying: ScriptedPlatform, tmp_path: Path
) -> None:
    """Check that no certificate is made earlier: that would be for the former epoch and open nothing."""
    queued = rental(state="queued", explanation="no worker has a free slot")
    moving = rental(state="migrating", explanation="its worker is down")
    certifying.answer("GET", "/api/rentals/abcdefgh23", queued, queued, moving, rental(epoch=3))
    done = await certified(certifying, tmp_path)
    assert (done.returncode, done.stdout) == (0, b"")
    *queued, moved_on = done.stderr.splitlines()
    assert_waited(b"\n".join(queued), "the rental is queued: no worker has a free slot")
    assert re.fullmatch(rb"orion: the rental is migrating: its worker is down; waiting \(\d+ s\)", moved_on)
    *looks, signs = certifying.calls
    assert [call.query["wait_s"] for call in looks] == ["0", "5", "5", "5"], "the platform waits, and not this side"
    assert (signs.method, signs.body["ssh_public_key"]) == ("POST", HOST_KEY)
    signed, epoch = (tmp_path / "orion/abcdefgh23-cert.pub").read_text().rsplit(" ", 1)
    assert (signed, epoch.partition("/")[0]) == (CERTIFICATE, "3")


@pytest.mark.parametrize("state", ["releasing", "released", "failed"])
async def test_a_request_for_a_certificate_does_not_wait_for_an_ended_rental(
    certifying: ScriptedPlatform, tmp_path: Path, state: str
) -> None:
    certifying.answer("GET", "/api/rentals/abcdefgh23", rental(state=state, explanation="asked for"))
    done = await certified(certifying, tmp_path)
    assert (done.returncode, done.stderr.decode()) == (1, f"orion: the rental is {state}: asked for\n")
    assert [call.method for call in certifying.calls] == ["GET"]


def test_ssh_waits_for_as_long_as_the_relay_does() -> None:
    assert connect.KEEP_TRYING_S + connect.OPEN_S < hosts.CONNECT_TIMEOUT_S


def self_signed(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "tls.crt", folder / "tls.key"
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def test_the_relay_starts_without_the_libraries_of_the_command() -> None:
    heavy = "{'typer', 'rich', 'pydantic', 'httpx'} & set(sys.modules)"
    program = f"import sys, orion.ssh_client.connect; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)})
