"""The inner side of the one door: only the proxy's connections are kept, only requests with its secret are answered."""

from __future__ import annotations

import hmac
import json
import re
import secrets
from asyncio import AbstractEventLoop, Transport
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orion.manager.api.bodies import announced
from orion.manager.api.problems import problem

log = structlog.get_logger()

SECRET_HEADER = "x-orion-proxy-secret"  # noqa: S105  the header's name
SECRET_HEADER_BYTES = SECRET_HEADER.encode()
WORD_EVERY_S = 60.0
"""Seconds between two lines in the log about peers that were hung up on."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{8,64}")


def protocol_for(peers: frozenset[str]) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol, which hangs up on every peer but these before a byte is read, and says so in the log.

    It answers what it cannot read as any refusal is answered. A WebSocket that begins with a body is refused: uvicorn
    would not answer it at all, and hold it for as long as its client does.
    """

    hung_up = HungUp(peers)

    class DoorProtocol(HttpToolsProtocol):
        _kept = False

        def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
            peer = transport.get_extra_info("peername")
            if not peer or peer[0] not in peers:
                transport.abort()
                hung_up.on(peer[0] if peer else "", self.loop.time())
                return
            self._kept = True
            super().connection_made(_InOnePiece(transport, self.loop))  # type: ignore[arg-type]

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
            if announced(dict(self.scope)) == 0:
                super().handle_websocket_upgrade()
            else:
                self.send_400_response("a WebSocket begins with a request that has no body")

        def send_400_response(self, msg: str) -> None:
            told = problem(400, "invalid_request", msg, {"connection": "close"})
            head = b"".join(b"%s: %s\r\n" % header for header in told.raw_headers)
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%s\r\n%s" % (head, told.body))
            self.transport.close()

    return DoorProtocol


class HungUp:
    """Says in the log which peers were hung up on: one line a minute, for anybody in the network can call."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self._wanted = ", ".join(sorted(wanted))
        self._next_word_at = float("-inf")
        self._since_last_word = 0

    def on(self, peer: str, now: float) -> None:
        """Count one connection of a peer; `now`: seconds by a clock that nobody sets."""
        self._since_last_word += 1
        if now < self._next_word_at:
            return
        log.warning(
            "hung up on a peer that is not the proxy",
            peer=peer,
            answered=self._wanted,
            connections=self._since_last_word,
            hint="if it is the network's gateway, a rule of the firewall hides who calls: make up as root says which",
        )
        self._next_word_at, self._since_last_word = now + WORD_EVERY_S, 0


class _InOnePiece:
    """A transport over which what is written in one go leaves in one piece.

    Uvicorn writes the head of a reply and its body, each at once: two system calls, and the proxy is woken twice.
    """

    def __init__(self, transport: Transport, loop: AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []

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


class ProxyGuard:
    """Refuses what lacks the proxy's secret (but the health check), and gives every reply its request id."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        secret, request_id = b"", ""
        for name, value in scope["headers"]:
            if name == SECRET_HEADER_BYTES:
                secret = value
            elif name == b"x-request-id":
                request_id = value.decode("latin-1")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        id_header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] in {"http.response.start", "websocket.http.response.start"}:
                others = (header for header in message.get("headers", ()) if header[0].lower() != b"x-request-id")
                message["headers"] = [*others, id_header]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            if scope["path"] == "/healthz" or hmac.compare_digest(secret, self._secret):
                await self._app(scope, receive, send_with_id)
            else:
                await _refuse(scope, send_with_id)


async def _refuse(scope: Scope, send: Send) -> None:
    body: dict[str, Any] = {"type": "about:blank", "title": "Forbidden", "status": 403, "code": "not_through_the_door"}
    body["detail"] = "the manager answers only what comes through manager_proxy"
    kind = "http.response" if scope["type"] == "http" else "websocket.http.response"
    headers = [(b"content-type", b"application/problem+json")]
    await send({"type": f"{kind}.start", "status": 403, "headers": headers})
    await send({"type": f"{kind}.body", "body": json.dumps(body).encode()})
