"""The OpenAPI document: beside what a route itself returns, how it refuses, and whose token it takes."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi

from orion import wire

PATH = "/api/openapi.json"
OF_THE_DOOR = {
    400: "The request is not well-formed HTTP",
    405: "No call, or not this one, takes this method",
    408: "The request came too slowly",
    413: "The body is larger than this call allows",
    414: "The address is too long",
    429: "Too many calls of this kind: wait as long as Retry-After says",
    431: "The headers are too large",
    500: "The platform failed; its log has the request's id",
    502: "The manager cannot be reached, or did not answer",
    504: "The manager did not answer in time",
}
"""Any call may be refused so, most of it by the proxy: manager_proxy/problems.conf."""

OF_THE_MANAGER = {
    401: "No valid token",
    403: "A token of another role",
    422: "The request is not as the contract has it; `errors` names the fields",
}
OF_A_ROUTE = {
    404: "There is none, or it is not yours",
    409: "It contradicts what is; `code` says what",
    503: "The platform has no room for more of it at present",
    507: "No room on the disk for it",
}

Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """For a route's `responses`: how it alone may refuse."""
    return {status: _refusal(OF_A_ROUTE[status]) for status in statuses}


def describe(app: FastAPI) -> None:
    """Make the application's document whole, and serve it to anyone.

    It is written once: more than 100 KB, which nobody should have us write again for each call without a token.
    """
    written: list[bytes] = []

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = _complete(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    async def serve() -> Response:
        if not written:
            written.append(json.dumps(document(), ensure_ascii=False, separators=(",", ":")).encode())
        return Response(written[0], media_type="application/json")

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it
    app.add_api_route(PATH, serve, methods=["GET"], include_in_schema=False)


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    schemas["Problem"] = wire.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answers = OF_THE_DOOR
            if path.startswith("/api/") or path == "/metrics":
                operation["security"] = [{"token": []}]
                answers = OF_THE_DOOR | OF_THE_MANAGER
            operation["responses"] |= {str(status): _refusal(meaning) for status, meaning in answers.items()}
    return document


def _refusal(meaning: str) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": meaning, "content": content}
