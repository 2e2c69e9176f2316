"""A real HTTP server with scripted answers, for the tests of the SDK and of the command."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMJmT9oQyXJXw1cMyxGBLCFfEDPrgh2TyT2PnTrEFpGq"


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    breaks: bool = False
    """Whether the connection closes after the body, whose length is not announced; without a body at once."""


@dataclass(frozen=True)
class PlatformCall:
    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: Any


class ScriptedPlatform:
    """The server. `answer` queues answers for a path; the last one stays.

    Answers for a path with a query, such as `/api/rentals?mine=true`, are for calls whose query contains that one.
    """

    def __init__(self) -> None:
        self.calls: list[PlatformCall] = []
        self._answers: dict[tuple[str, str], list[Answer]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True).start()

    def answer(self, method: str, path: str, *answers: Answer | dict[str, Any] | list[Any]) -> None:
        self._answers[method, path] = [one if isinstance(one, Answer) else Answer(body=one) for one in answers]

    def forget(self) -> None:
        self.calls.clear()
        self._answers.clear()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _next(self, call: PlatformCall) -> Answer:
        self.calls.append(call)
        paths = [path for (method, path) in self._answers if method == call.method and _is_answer_to(path, call)]
        waiting = self._answers.get((call.method, max(paths, key=len, default="")))
        if not waiting:
            return problem(404, "not_found", "there is no such thing")
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    def _handler(platform) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - self is the handler's
        class PlatformHandler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _serve(self) -> None:
                parts = urlsplit(self.path)
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                query = dict(parse_qsl(parts.query))
                self._reply(platform._next(PlatformCall(self.command, parts.path, query, self.headers, body)))

            def _reply(self, answer: Answer) -> None:
                if answer.breaks and answer.body is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.breaks:
                    self.close_connection = True
                elif answer.status != 204:
                    self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                if answer.status != 204:
                    self.wfile.write(raw)

            do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - the names that http.server calls

            def log_message(self, *_: Any) -> None:
                pass

        return PlatformHandler


def _is_answer_to(path: str, call: PlatformCall) -> bool:
    """Return whether an answer for this path, with or without a query, fits the call."""
    parts = urlsplit(path)
    return parts.path == call.path and dict(parse_qsl(parts.query)).items() <= call.query.items()


def problem(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> Answer:
    body = {"type": "about:blank", "title": "Refused", "status": status, "code": code, "detail": detail}
    return Answer(status, body, {"Content-Type": "application/problem+json", **(headers or {})})


def page(*items: dict[str, Any], following: str | None = None) -> dict[str, Any]:
    return {"items": list(items), "next": following}


def rental(**changes: Any) -> dict[str, Any]:
    return {
        "id": "abcdefgh23",
        "name": "box",
        "owner": "ada",
        "state": "active",
        "epoch": 1,
        "worker_id": "w-aaaa2222",
        "moving_to": None,
        "username": "r-abcdefgh23",
        "ssh_host_keys": [HOST_KEY],
        "labels": {},
        "ttl_s": 86400,
        "created_at": "2030-01-01T00:00:00Z",
        "expires_at": "2130-01-01T00:00:00Z",
        "last_safe_copy_at": None,
        "last_safe_copy_bytes": None,
        "copy_problem": "",
        "home_warning": "",
        "salvage": None,
        "start": None,
        "start_problem": "",
        "start_end": "",
        "start_ended_at": None,
        "public_ports": [],
        "explanation": "",
        **changes,
    }


def worker(**changes: Any) -> dict[str, Any]:
    return {
        "id": "w-aaaa2222",
        "hostname": "0123456789ab",
        "address": "172.20.128.2",
        "health": "ready",
        "intent": "active",
        "slots": 1,
        "slots_free": 1,
        "labels": {},
        "load": {"cpu": 0.5, "memory_used_bytes": 1 << 27, "memory_limit_bytes": 1 << 29, "processes": 7},
        "last_heartbeat_at": "2030-01-01T00:00:00Z",
        "ssh_host_keys": [HOST_KEY],
        "explanation": "",
        **changes,
    }


def token(**changes: Any) -> dict[str, Any]:
    return {
        "id": "t1",
        "name": "ada",
        "role": "client",
        "created_at": "2030-01-01T00:00:00Z",
        "expires_at": None,
        "revoked_at": None,
        **changes,
    }


def event(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "at": "2030-01-01T00:00:00Z",
        "kind": "rental.activated",
        "actor": "reconciler",
        "reason": "its worker is ready",
        "owner": "ada",
        "rental_id": "abcdefgh23",
        "worker_id": "w-aaaa2222",
        "epoch": 1,
        "details": {},
        **changes,
    }


def stream(*events: dict[str, Any]) -> Answer:
    """Return the answer of a stream that breaks after these events."""
    text = ": hello\n\n" + "".join(
        f"id: {one['id']}\nevent: {one['kind']}\ndata: {json.dumps(one)}\n\n" for one in events
    )
    return Answer(body=text.encode(), headers={"Content-Type": "text/event-stream"}, breaks=True)
