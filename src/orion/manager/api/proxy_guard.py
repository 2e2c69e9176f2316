"""The guard that makes the proxy the only way in, by the peer of each connection and the secret of each request."""

from __future__ import annotations

import hmac
import re
import secrets
from asyncio import AbstractEventLoop, Transport
from dataclasses import dataclass, field
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orion.manager.api.bodies import declared_length
from orion.manager.api.problems import problem

log = structlog.get_logger()

SECRET_HEADER = "x-orion-proxy-secret"  # noqa: S105  the header's name
SECRET_HEADER_BYTES = SECRET_HEADER.encode()
LOG_EVERY_S = 60.0
"""Seconds between two lines in the log about connections that were closed."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{8,64}")


def protocol_for(peers: frozenset[str]) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol, which closes the connection of every peer but these before it reads a byte.

    A request that cannot be parsed is answered with a problem, as any other refusal. A WebSocket handshake with a body
    is refused: uvicorn would never answer it, and would keep the connection as long as the client does.
    """
    rejected = RejectedPeers(peers)

    class GuardedProtocol(HttpToolsProtocol):
        _kept = False

        def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
            peer = transport.get_extra_info("peername")
            if not peer or peer[0] not in peers:
                transport.abort()
                rejected.note(peer[0] if peer else "", self.loop.time())
                return
            self._kept = True
            super().connection_made(_JoinedWrites(transport, self.loop))  # type: ignore[arg-type]

        def connection_lost(self, exc: Exception | None) -> None:
            if self._kept:
                super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._kept:
                super().data_received(data)

        def eof_received(self) -> None:
            if self._kept:
                super().eof_received()

        def handle_websocket_upgrade(self) -> None:
            if declared_length(dict(self.scope)) == 0:
                super().handle_websocket_upgrade()
            else:
                self.send_400_response("the handshake of a WebSocket may not have a body")

        def send_400_response(self, msg: str) -> None:
            reply = problem(400, "invalid_request", msg, {"connection": "close"})
            head = b"".join(b"%s: %s\r\n" % header for header in reply.raw_headers)
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%s\r\n%s" % (head, reply.body))
            self.transport.close()

    return GuardedProtocol


class RejectedPeers:
    """A log of closed connections with at most one line a minute, because any container in the network can connect."""

    def __init__(self, accepted: frozenset[str]) -> None:
        self._accepted = ", ".join(sorted(accepted))
        self._next_line_at = float("-inf")
        self._since_last_line = 0

    def note(self, peer: str, now: float) -> None:
        """Count one connection of a peer; `now` is in monotonic seconds."""
        self._since_last_line += 1
        if now < self._next_line_at:
            return
        log.warning(
            "closed the connection of a peer that is not the proxy",
            peer=peer,
            accepted=self._accepted,
            connections=self._since_last_line,
            hint="if the peer is the network's gateway, a firewall rule hides the callers' addresses: run make up as "
            "root, which names the rule",
        )
        self._next_line_at, self._since_last_line = now + LOG_EVERY_S, 0


@dataclass(eq=False)
class _JoinedWrites:
    """A transport that sends all writes of one turn of the event loop in one system call.

    Uvicorn writes a reply's head and its body separately: two system calls, and the proxy would wake twice.
    """

    _transport: Transport
    _loop: AbstractEventLoop
    _waiting: list[bytes] = field(default_factory=list)

    def write(self, data: bytes) -> None:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            whole, self._waiting = b"".join(self._waiting), []
            self._transport.write(whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@dataclass(frozen=True)
class ProxyGuard:
    """A middleware that refuses requests without the proxy secret, but not the health check, and adds request ids."""

    app: ASGIApp
    secret: bytes = field(repr=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        secret, request_id = b"", ""
        for name, value in scope["headers"]:
            if name == SECRET_HEADER_BYTES:
                secret = value
            elif name == b"x-request-id":
                request_id = value.decode("latin-1")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)

        async def send_with_id(message: Message) -> None:
            if message["type"] in {"http.response.start", "websocket.http.response.start"}:
                others = [header for header in message.get("headers", ()) if header[0].lower() != b"x-request-id"]
                message["headers"] = [*others, (b"x-request-id", request_id.encode())]
            await send(message)

        # No reset afterwards: uvicorn runs each request in a task, whose context ends with it.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        if scope["path"] == "/healthz" or hmac.compare_digest(secret, self.secret):
            await self.app(scope, receive, send_with_id)
        else:
            detail = "the manager answers only requests that come through manager_proxy: send it there"
            await problem(403, "not_through_the_door", detail)(scope, receive, send_with_id)
