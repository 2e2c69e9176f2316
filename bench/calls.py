"""A timed HTTP connection that stays open. It does as little as possible, so that it adds nothing to the figures."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from types import TracebackType
from typing import Any, Self

TIMEOUT_S = 70.0
"""Seconds: longer than a client may ask the manager to wait."""


@dataclass(frozen=True)
class TimedReply:
    status: int
    body: Any
    seconds: float


class Caller:
    def __init__(
        self,
        host: str,
        port: int,
        token: str,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._connection = HTTPConnection(host, port, timeout=timeout_s)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **(headers or {})}

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> TimedReply:
        """Return the reply, timed from the first byte sent to the last received. Raise OSError, or HTTPException."""
        payload = None if body is None else json.dumps(body).encode()
        began = time.perf_counter()
        try:
            self._connection.request(method, path, payload, self._headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, HTTPException):
            self._connection.close()  # the next call opens it anew
            raise
        seconds = time.perf_counter() - began
        return TimedReply(
            response.status, json.loads(content) if content[:1] in {b"{", b"["} else content.decode(), seconds
        )

    def must(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> TimedReply:
        """Return the reply to a call. Raise RuntimeError if it failed: then the measurement means nothing."""
        reply = self.call(method, path, body)
        if reply.status >= 300:
            raise RuntimeError(f"{method} {path} was answered with {reply.status}: {reply.body}")
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
