"""The tree of exceptions that the SDK, the command and the relay raise; the message says what to do.

Standard library only: `orion.connect` starts before every SSH session and must not load an HTTP client.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


class OrionError(Exception):
    """Something did not work. `code` is stable and for programs; `exit_code` is the command's exit status."""

    code = "error"
    exit_code = 1


class Retryable(OrionError):
    """The same call may succeed a little later. `retry_after_s`: how long the server asked to wait, if it did."""

    retry_after_s: float | None = None


class InvalidInput(OrionError):
    """What was given to the client can never be accepted; nothing was sent."""

    code = "invalid_input"
    exit_code = 2


class LocalFault(OrionError):
    """This machine lacks something, or forbids it."""

    code = "local_fault"


class NotLoggedIn(OrionError):
    code = "not_logged_in"
    exit_code = 4


class Unreachable(Retryable):
    """No reply came: whether the request was carried out is unknown."""

    code = "unreachable"
    exit_code = 5


class Untrusted(OrionError):
    """The server's certificate was not accepted. Not retryable: it will not be accepted later either."""

    code = "untrusted_certificate"
    exit_code = 5


class UnreadableReply(OrionError):
    """What answered does not speak Orion's contract."""

    code = "unreadable_reply"


class Ambiguous(OrionError):
    """A name that several things bear; `candidates` are their ids."""

    code = "ambiguous_name"
    exit_code = 6

    def __init__(self, message: str, candidates: Sequence[str]) -> None:
        super().__init__(message)
        self.candidates = list(candidates)


class Ended(OrionError):
    """The rental is over."""

    code = "ended"
    exit_code = 6


class NotMoved(OrionError):
    """It could not be moved, and goes on where it is."""

    code = "not_moved"
    exit_code = 6


class StillWaiting(OrionError):
    """It was accepted and goes on by itself, but was not done in the time that was given."""

    code = "still_waiting"
    exit_code = 7


class ApiError(OrionError):
    """The manager, or the proxy in front of it, refused."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
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
    exit_code = 4


class Forbidden(ApiError):
    exit_code = 4


class NotFound(ApiError):
    exit_code = 3


class Conflict(ApiError):
    exit_code = 6


class InvalidRequest(ApiError):
    exit_code = 2


class ServerFault(ApiError):
    """A 5xx that nobody marked: retrying it blindly could do harm."""


class RateLimited(ApiError, Retryable):
    pass


class ManagerUnreachable(ApiError, Retryable):
    """The proxy's own, marked reply: the manager did not get the request."""

    exit_code = 5


class NoAnswer(ApiError, Retryable):
    """The proxy's own reply when the manager went away in the middle: it may have done what was asked.

    Only what may be repeated is sent again: a rent has its idempotency key, a release may be said twice.
    """

    exit_code = 5


_BY_STATUS: dict[int, type[ApiError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    422: InvalidRequest,
    429: RateLimited,
}


def refusal(status: int, headers: Mapping[str, str], body: bytes, now: datetime | None = None) -> ApiError:
    """The exception for a reply that is not a success. `headers` must be a case-insensitive mapping."""
    problem = _problem(body)
    kind = _BY_STATUS.get(status, ServerFault if status >= 500 else ApiError)
    if status in {502, 504} and headers.get("X-Orion-Manager") == "unreachable":
        kind = ManagerUnreachable
    elif status in {502, 504} and problem.get("code") == "manager_no_answer":
        kind = NoAnswer
    return kind(
        status,
        str(problem.get("code") or f"http_{status}"),
        _detail(problem, status),
        headers.get("X-Request-ID"),
        [one for one in problem.get("errors") or [] if isinstance(one, dict)],
        _seconds(headers.get("Retry-After"), now or datetime.now(UTC)),
    )


def no_reply(url: str, error: BaseException) -> OrionError:
    """The exception for a connection that failed or broke, whatever library noticed it."""
    import ssl  # noqa: PLC0415 - it takes long to load, and where nothing failed nobody needs it

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Untrusted(
                f"the certificate of {url} is not trusted ({cause.verify_message}). If it is self-signed, "
                f"get it from whoever runs the platform and log in with: orion login {url} --ca-file FILE"
            )
    return Unreachable(f"{url} cannot be reached: {_reason(causes)}. Is it up? On its machine: make up.")


def _problem(body: bytes) -> dict[str, Any]:
    try:
        problem = json.loads(body)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _detail(problem: Mapping[str, Any], status: int) -> str:
    text = problem.get("detail") or problem.get("title")
    return str(text) if text else f"it answered HTTP {status}, without saying why"


def _seconds(retry_after: str | None, now: datetime) -> float | None:
    """RFC 9110, 10.2.3: a number of seconds or a date."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    from email.utils import parsedate_to_datetime  # noqa: PLC0415 - as above

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
