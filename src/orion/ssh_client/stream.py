"""Raw connections to the platform for `orion connect`, and HTTP requests over them.

A connection uses the environment's forward proxy, and TLS if the login's address is https. This module uses the
standard library only, as `orion.errors` does.
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

MAX_HEAD_BYTES = 64 << 10  # bytes of a reply's head, at most
MAX_REFUSAL_BYTES = 64 << 10  # bytes that are read of a refusal's body, at most
PORTS = {"http": 80, "https": 443}


def connect(account: Login, within_s: float) -> socket.socket:
    """Return a verified connection to the platform. Raise OrionError.

    `within_s` is the limit of each step in seconds, and stays the connection's timeout.
    """
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
    """Send a GET and return the head of the reply with the bytes that follow it. Raise OSError."""
    send(stream, account, path, headers)
    return _reply(stream, account.url)


def send(
    stream: socket.socket, account: Login, path: str, headers: Mapping[str, str], body: Mapping[str, Any] | None = None
) -> None:
    """Send a GET, or a POST if there is a body. Raise OSError."""
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
    """The status and the headers of a reply. Case does not matter in names of headers."""

    status: int

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        """Return the value of a header, or the default."""
        return super().get(name.lower(), default)


def rest_of_refusal(stream: socket.socket, head: Head, begun: bytes) -> bytes:
    """Return the first MAX_REFUSAL_BYTES of the body that begins with `begun`. Raise OSError."""
    length = head.get("content-length") or ""
    wanted = min(int(length), MAX_REFUSAL_BYTES) if length.isdecimal() else MAX_REFUSAL_BYTES
    while len(begun) < wanted and (part := stream.recv(wanted - len(begun))):
        begun += part
    return begun[:wanted]


def _through_proxy(proxy: str | None, host: str, port: int, within_s: float) -> socket.socket:
    if proxy is None:
        return socket.create_connection((host, port), within_s)
    parts = urlsplit(proxy)
    if parts.scheme != "http":
        advice = f"unset its variable, or set NO_PROXY={host}"
        raise InvalidInput(f"orion connect can use http proxies only, not {proxy}: {advice}")
    stream = socket.create_connection((parts.hostname or "", parts.port or 80), within_s)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        lines.append(f"Proxy-Authorization: Basic {binascii.b2a_base64(pair, newline=False).decode()}")
    stream.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    head, early = _reply(stream, f"http://{parts.hostname}:{parts.port or 80}")
    if head.status != 200 or early:
        raise Unreachable(f"the forward proxy {parts.hostname} did not connect to {target}: HTTP {head.status}")
    return stream


def _reply(stream: socket.socket, url: str) -> tuple[Head, bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        if not (part := stream.recv(MAX_HEAD_BYTES)):
            raise ConnectionResetError(f"{url} closed the connection")
        received += part
        if len(received) > MAX_HEAD_BYTES:
            raise UnreadableReply(f"{url} did not answer as Orion does. Check that it is the right address")
    text, _, rest = received.partition(b"\r\n\r\n")
    first, *lines = text.decode("latin-1").split("\r\n")
    protocol, _, status = first.partition(" ")
    if not protocol.startswith("HTTP/1.") or not status[:3].isdecimal():
        raise UnreadableReply(f"{url} did not answer as Orion does. Check that it is the right address")
    head = Head((name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines))
    head.status = int(status[:3])
    return head, rest
