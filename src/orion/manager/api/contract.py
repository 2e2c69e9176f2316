"""The OpenAPI document, completed with the refusals of each route and the token that it takes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi

from orion import wire

PATH = "/api/openapi.json"
REFUSALS_OF_THE_PROXY = {
    400: "The request is not well-formed HTTP",
    405: "This call does not take this method",
    408: "The request came too slowly",
    413: "The body is larger than this call allows",
    414: "The address is too long",
    429: "Too many calls of this kind: wait as long as Retry-After says",
    431: "The headers are too large",
    500: "The platform failed; its log has the request's id",
    502: "The manager cannot be reached, or did not answer",
    504: "The manager did not answer in time",
}
"""The refusals that any call may get, most of them from the proxy: manager_proxy/problems.conf."""

REFUSALS_OF_THE_MANAGER = {
    401: "The token is missing or not valid",
    403: "The token has a role that may not make this call",
    422: "The request does not match the schema; `errors` names the fields",
}
REFUSALS_OF_A_ROUTE = {
    404: "It does not exist, or it is not yours",
    409: "The call conflicts with the present state; `code` says how",
    503: "The platform is at its limit for this at present: try again later",
    507: "There is no room on the disk",
}

Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """Return the refusals of one route, for its `responses`."""
    return {status: _refusal(REFUSALS_OF_A_ROUTE[status]) for status in statuses}


def describe(app: FastAPI) -> None:
    """Complete the application's document, and serve it without a token; its 100 KB are encoded only once."""

    @cache
    def document() -> dict[str, Any]:
        return _complete(get_openapi(title=app.title, version=app.version, routes=app.routes))

    @cache
    def encoded() -> bytes:
        return json.dumps(document(), ensure_ascii=False, separators=(",", ":")).encode()

    async def serve() -> Response:
        return Response(encoded(), media_type="application/json")

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it
    app.add_api_route(PATH, serve, methods=["GET"], include_in_schema=False)


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    schemas["Problem"] = wire.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        needs_token = path.startswith("/api/") or path == "/metrics"
        answers = REFUSALS_OF_THE_PROXY | (REFUSALS_OF_THE_MANAGER if needs_token else {})
        for operation in operations.values():
            if needs_token:
                operation["security"] = [{"token": []}]
            operation["responses"] |= {str(status): _refusal(meaning) for status, meaning in answers.items()}
    return document


def _refusal(meaning: str) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": meaning, "content": content}
