"""Errors as application/problem+json (RFC 9457): a stable code, and a detail that says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orion.manager.refusals import ApiProblem
from orion.wire import MAX_KEYS, MAX_PUBLIC_PORTS, in_words

log = structlog.get_logger()

TITLES = {
    400: "Bad request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    408: "Request timeout",
    409: "Conflict",
    422: "Invalid request",
    429: "Too many requests",
    500: "Internal error",
    502: "Bad gateway",
    503: "Not available",
}
CONFLICTS = {
    "ended": "the rental is ending or has ended: rent another one with: orion rent",
    "last_key": "this is the rental's only key, without which it could not be opened: add another one first",
    "no_start": "the rental has no start command: it can only be given when renting, with: orion rent --start COMMAND",
    "no_such_snapshot": "that snapshot was removed meanwhile to make room: list the kept ones with: orion snapshots",
    "not_active_yet": "the rental was never active, so there is nothing to restore",
    "too_many_keys": f"the rental has {MAX_KEYS} keys, and may have no more: remove one first",
    "too_many_ports": f"{MAX_PUBLIC_PORTS} of its ports are public, and no more may be: make one private first",
}
"""The details of the codes with which the database refuses a change of a rental."""
CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}


def problem(
    status: int, code: str, detail: str, headers: dict[str, str] | None = None, **more: list[dict[str, str]]
) -> JSONResponse:
    """Return the reply of an error; `more` are further fields of its body."""
    body = {"type": "about:blank", "title": TITLES.get(status, "Error"), "status": status, "code": code}
    return JSONResponse(body | {"detail": detail} | more, status, headers, media_type="application/problem+json")


def refused(error: ApiProblem) -> JSONResponse:
    return problem(error.status, error.code, error.detail, error.headers)


def refuse_conflict(code: str) -> None:
    """Raise 409 with the code of a conflict, unless the code is empty."""
    if code:
        raise ApiProblem(409, code, CONFLICTS[code])


def install(app: FastAPI) -> None:
    """Map every error that leaves a route to a problem."""

    @app.exception_handler(ApiProblem)
    async def _known(_: Request, error: ApiProblem) -> JSONResponse:
        return refused(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [{"field": _field(item), "message": in_words(item)} for item in error.errors()[:20]]
        first = "; ".join(f"{item['field'] or 'the body'} {item['message']}" for item in errors[:3])
        if error.body and "json" not in request.headers.get("content-type", ""):
            first = f"send JSON, with the header 'Content-Type: application/json' ({first})"
        return problem(422, "invalid_request", first, errors=errors)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        code = CODES.get(error.status_code, "error")
        return problem(error.status_code, code, str(error.detail), dict(error.headers or {}))

    app.add_middleware(Mistakes)


def _field(error: Mapping[str, Any]) -> str:
    """Return the name of the field at fault; empty for a body that is not JSON, where pydantic gives a position."""
    return "" if error["type"] == "json_invalid" else ".".join(str(part) for part in error["loc"][1:])


@dataclass(frozen=True)
class Mistakes:
    """A middleware that answers unexpected exceptions with a problem; log and reply carry the request's id."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noting_send)
        except ClientDisconnect:
            return  # the client disconnected while it sent the body, so there is no one to answer
        except Exception as error:
            if scope["type"] != "http" or started:
                raise
            log.error("request failed", path=scope["path"], exc_info=error)
            detail = "the manager failed; its log has the cause under the id of this request (X-Request-ID)"
            await problem(500, "internal_error", detail)(scope, receive, send)
