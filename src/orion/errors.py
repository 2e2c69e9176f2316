"""The exceptions that the SDK, the command and `orion connect` raise. Each message says what to do.

This module uses the standard library only, because `orion.ssh_client.connect` starts before every SSH session.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


class OrionError(Exception):
    """The base of all errors. `code` is stable and meant for programs; `exit_code` is the command's exit status."""

    code = "error"
    exit_code = 1


class Retryable(OrionError):
    """The call failed, and the same call may succeed a little later."""

    retry_after_s: float | None = None
    """Seconds that the server asked to wait; None if it named no time."""


class InvalidInput(OrionError):
    """The client was given a value that can never be accepted; it sent nothing."""

    code = "invalid_input"
    exit_code = 2


class LocalFault(OrionError):
    """This machine lacks a program or a file, or forbids its use."""

    code = "local_fault"


class NotLoggedIn(OrionError):
    """There is no usable login on this machine."""

    code = "not_logged_in"
    exit_code = 4


class Unreachable(Retryable):
    """No reply came, so the client does not know whether the request was carried out."""

    code = "unreachable"
    exit_code = 5


class Untrusted(OrionError):
    """The server's certificate was not accepted. A retry would not help."""

    code = "untrusted_certificate"
    exit_code = 5


class UnreadableReply(OrionError):
    """The reply does not follow Orion's contract."""

    code = "unreadable_reply"


class Ambiguous(OrionError):
    """Several things have the same name; `candidates` are their ids."""

    code = "ambiguous_name"
    exit_code = 6

    def __init__(self, message: str, candidates: Sequence[str]) -> None:
        super().__init__(message)
        self.candidates = list(candidates)


class Ended(OrionError):
    """The rental or the drain has ended."""

    code = "ended"
    exit_code = 6


class NotMigrated(OrionError):
    """The rental could not be migrated and stays on its worker."""

    code = "not_moved"
    exit_code = 6


class StillWaiting(OrionError):
    """The platform accepted the request and continues with it, but did not finish in the given time."""

    code = "still_waiting"
    exit_code = 7


class ApiError(OrionError):
    """The manager, or the proxy in front of it, refused the request."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        request_id: str | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.errors = list(errors)
        self.retry_after_s = retry_after_s


class Unauthorized(ApiError):
    """The token is missing, unknown, expired or revoked."""

    exit_code = 4


class Forbidden(ApiError):
    """The token's role does not allow the request."""

    exit_code = 4


class NotFound(ApiError):
    """The thing that the request names does not exist."""

    exit_code = 3


class Conflict(ApiError):
    """The present state does not allow the request."""

    exit_code = 6


class InvalidRequest(ApiError):
    """A field of the request has a wrong value."""

    exit_code = 2


class ServerFault(ApiError):
    """The server answered with a 5xx that is not marked as harmless, so a retry could carry the request out twice."""


class RateLimited(ApiError, Retryable):
    """The caller sends more requests than it may."""


class ManagerUnreachable(ApiError, Retryable):
    """The proxy answered in place of the manager, which did not get the request."""

    exit_code = 5


class NoAnswer(ApiError, Retryable):
    """The proxy answered in place of the manager, which broke off and may have carried the request out.

    The client sends only repeatable requests again, such as a rent with its idempotency key, or a release.
    """

    exit_code = 5


_BY_STATUS = {401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 422: InvalidRequest, 429: RateLimited}


def refusal(status: int, headers: Mapping[str, str], body: bytes, now: datetime | None = None) -> ApiError:
    """Return the exception for a reply that is not a success. `headers` must be a case-insensitive mapping."""
    problem = _problem(body)
    detail = problem.get("detail") or problem.get("title") or f"the platform answered HTTP {status} without a reason"
    kind = _BY_STATUS.get(status, ServerFault if status >= 500 else ApiError)
    if status in {502, 504} and headers.get("X-Orion-Manager") == "unreachable":
        kind = ManagerUnreachable
    elif status in {502, 504} and problem.get("code") == "manager_no_answer":
        kind = NoAnswer
    return kind(
        status,
        str(problem.get("code") or f"http_{status}"),
        str(detail),
        request_id=headers.get("X-Request-ID"),
        errors=[one for one in problem.get("errors") or [] if isinstance(one, dict)],
        retry_after_s=_seconds(headers.get("Retry-After"), now or datetime.now(UTC)),
    )


def no_reply(url: str, error: BaseException) -> OrionError:
    """Return the exception for a connection that failed or broke, from the error of any library."""
    import ssl  # noqa: PLC0415 - this module takes long to load and is needed after a failure alone

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Untrusted(
                f"the certificate of {url} is not trusted ({cause.verify_message}). If it is self-signed, "
                f"ask the platform's operator for it and run: orion login {url} --ca-file FILE"
            )
    return Unreachable(f"{url} cannot be reached: {_reason(causes)}. To start it, run on its machine: make up")


def _problem(body: bytes) -> dict[str, Any]:
    try:
        problem = json.loads(body)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _seconds(retry_after: str | None, now: datetime) -> float | None:
    """Return the seconds of a Retry-After header, which is a number or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    from email.utils import parsedate_to_datetime  # noqa: PLC0415 - this module takes long to load, too

    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - now).total_seconds())
    except (ValueError, TypeError):
        return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
        error = inner or error.__cause__ or error.__context__


def _reason(causes: Sequence[BaseException]) -> str:
    for cause in causes:
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, socket.gaierror):
            return "no such host name"
        if isinstance(cause, TimeoutError):
            return "no answer in time"
        if isinstance(cause, ConnectionError):
            return "the connection broke"
    return str(causes[0]) or type(causes[0]).__name__
