"""How a request is refused: an exception with a status, a stable code, and a detail that says what to do.

The routes raise it, and so does the gateway. What a client reads of it is made in api/problems.py.
"""

from __future__ import annotations


class ApiProblem(Exception):
    """A refusal, as the client will read it."""

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers or {}


def unauthorized(why: str = "this token is not valid here") -> ApiProblem:
    """Return the refusal of a token. Most who read it cannot make tokens: it sends them to whoever can."""
    headers = {"WWW-Authenticate": 'Bearer realm="orion"'}
    detail = f"{why}. Ask whoever runs this platform for a token, then log in with it: orion login URL"
    return ApiProblem(401, "unauthorized", detail, headers)


def not_found(what: str) -> ApiProblem:
    """Return the refusal for something that does not exist, or that the caller may not know of."""
    return ApiProblem(404, "not_found", f"there is no such {what}, or it is not yours")
