"""The refusals of requests that routes and the gateway raise. api/problems.py makes the answers."""

from __future__ import annotations


class ApiProblem(Exception):
    """A refused request: HTTP status, stable code, and a detail that says what the client can do."""

    def __init__(self, status: int, code: str, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, headers or {}


def unauthorized(why: str = "this token is not valid here") -> ApiProblem:
    """Return the refusal of a token. It names the operator, because most clients cannot make tokens."""
    headers = {"WWW-Authenticate": 'Bearer realm="orion"'}
    detail = f"{why}. Ask the operator of this platform for a token, then log in with it: orion login URL"
    return ApiProblem(401, "unauthorized", detail, headers=headers)


def not_found(what: str) -> ApiProblem:
    """Return the refusal for a thing that does not exist, or that the client may not see."""
    return ApiProblem(404, "not_found", f"there is no such {what}, or it is not yours")
