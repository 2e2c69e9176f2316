"""A connection to the platform for `orion connect`: through the environment's forward proxy, with TLS where the login
says so, and with the certificate that was pinned there. Standard library only, as `orion.errors`.
"""

from __future__ import annotations

import binascii
import json
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from orion import __version__, login
from orion.errors import InvalidInput, Unreachable, UnreadableReply, no_reply
from orion.login import Login

LONGEST_HEAD = 64 << 10
LONGEST_BODY = 64 << 10
"""Of a refusal."""
PORTS = {"http": 80, "https": 443}


def connect(account: Login, within_s: float) -> socket.socket:
    """To the platform, verified; raises OrionError. `within_s` is for each step, and left as its timeout."""
    parts = urlsplit(account.url)
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    try:
        stream = _through_proxy(login.proxy_for(account.url), host, port, within_s)
        if parts.scheme == "https":
            stream = login.tls_context(account).wrap_socket(stream, server_hostname=host)
    except OSError as error:
        raise no_reply(account.url, error) from error
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def ask(stream: socket.socket, account: Login, path: str, headers: Mapping[str, str]) -> tuple[Head, bytes]:
    """Send a GET; the head of its reply, and what has come after it. Raises OSError."""
    send(stream, account, path, headers)
    return _reply(stream, account.url)


def send(
    stream: socket.socket, account: Login, path: str, headers: Mapping[str, str], body: Mapping[str, Any] | None = None
) -> None:
    """Send a GET, or a POST where there is a body. Raises OSError."""
    parts = urlsplit(account.url)
    content = b"" if body is None else json.dumps(body).encode()
    if body is not None:
        headers = {**headers, "Content-Type": "application/json", "Content-Length": str(len(content))}
    lines = [
        f"{'GET' if body is None else 'POST'} {parts.path}{path} HTTP/1.1",
        f"Host: {parts.netloc}",
        f"Authorization: Bearer {account.token}",
        f"User-Agent: orion/{__version__}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    stream.sendall(("\r\n".join(lines) + "\r\n\r\n").encode() + content)


class Head(dict[str, str]):
    """The status and the headers of a reply. Names of headers are the same in whatever letters."""

    status: int

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        return super().get(name.lower(), default)


def rest_of_refusal(stream: socket.socket, head: Head, begun: bytes) -> bytes:
    """The body of a reply that is short. Raises OSError."""
    length = head.get("content-length") or ""
    wanted = min(int(length), LONGEST_BODY) if length.isdecimal() else LONGEST_BODY
    while len(begun) < wanted and (part := stream.recv(wanted - len(begun))):
        begun += part
    return begun[:wanted]


def _through_proxy(proxy: str | None, host: str, port: int, within_s: float) -> socket.socket:
    if proxy is None:
        return socket.create_connection((host, port), within_s)
    parts = urlsplit(proxy)
    if parts.scheme != "http":
        raise InvalidInput(f"orion connect speaks to a forward proxy by http only: unset {proxy}, or NO_PROXY={host}")
    stream = socket.create_connection((parts.hostname or "", parts.port or 80), within_s)
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        lines.append(f"Proxy-Authorization: Basic {binascii.b2a_base64(pair, newline=False).decode()}")
    stream.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    head, early = _reply(stream, f"http://{parts.hostname}:{parts.port or 80}")
    if head.status != 200 or early:
        raise Unreachable(f"the forward proxy {parts.hostname} does not connect to {place}: HTTP {head.status}")
    return stream


def _reply(stream: socket.socket, url: str) -> tuple[Head, bytes]:
    got = b""
    while b"\r\n\r\n" not in got:
        part = stream.recv(LONGEST_HEAD)
        if not part:
            raise ConnectionResetError(f"{url} hung up")
        got += part
        if len(got) > LONGEST_HEAD:
            raise UnreadableReply(f"{url} answered something else than Orion does: is it the right address?")
    text, _, rest = got.partition(b"\r\n\r\n")
    first, *lines = text.decode("latin-1").split("\r\n")
    protocol, _, status = first.partition(" ")
    if not protocol.startswith("HTTP/1.") or not status[:3].isdecimal():
        raise UnreadableReply(f"{url} answered something else than Orion does: is it the right address?")
    head = Head((name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines))
    head.status = int(status[:3])
    return head, rest
