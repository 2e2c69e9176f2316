"""Access to the API: the proxy guard, tokens and roles, and the shape of every refusal."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs
from support.builders import host_key
from support.harness import PROXY_SECRET, Harness

from orion.manager.api.proxy_guard import SECRET_HEADER
from orion.manager.store.database import Store

ROUTES: list[tuple[str, str, dict[str, Any] | None, set[str]]] = [
    ("POST", "/api/register", {}, {"join", "worker"}),
    ("POST", "/api/heartbeat", {}, {"worker"}),
    ("POST", "/api/rent", {"wait_s": 0}, {"client", "admin"}),
    ("GET", "/api/rentals", None, {"client", "admin"}),
    ("GET", "/api/rentals/x", None, {"client", "admin"}),
    ("POST", "/api/rentals/x/renew", {"ttl_s": 60}, {"client", "admin"}),
    ("DELETE", "/api/rentals/x", None, {"client", "admin"}),
    ("POST", "/api/rentals/x/migrate", None, {"client", "admin"}),
    ("GET", "/api/rentals/x/log", None, {"client", "admin"}),
    ("GET", "/api/rentals/x/snapshots", None, {"client", "admin"}),
    ("POST", "/api/rentals/x/restore", {"empty": True}, {"client", "admin"}),
    ("POST", "/api/rentals/x/start", None, {"client", "admin"}),
    ("POST", "/api/rentals/x/thaw", None, {"client", "admin"}),
    ("GET", "/api/ssh-authority", None, {"client", "admin"}),
    ("GET", "/api/rentals/x/keys", None, {"client", "admin"}),
    ("POST", "/api/rentals/x/keys", {"ssh_public_key": host_key(1)}, {"client", "admin"}),
    ("DELETE", "/api/rentals/x/keys/x", None, {"client", "admin"}),
    ("POST", "/api/rentals/x/certificate", {"ssh_public_key": host_key(1)}, {"client", "admin"}),
    ("POST", "/api/rentals/x/terminal", None, {"client", "admin"}),
    ("GET", "/api/rentals/x/ports", None, {"client", "admin"}),
    ("PUT", "/api/rentals/x/ports/8000", {"public": True}, {"client", "admin"}),
    ("POST", "/api/rentals/x/ports/8000/ticket", None, {"client", "admin"}),
    ("GET", "/api/events", None, {"client", "admin"}),
    ("GET", "/api/status", None, {"client", "admin"}),
    ("GET", "/metrics", None, {"admin"}),
    ("GET", "/api/workers", None, {"admin"}),
    ("GET", "/api/workers/x", None, {"admin"}),
    ("POST", "/api/workers/x/drain", None, {"admin"}),
    ("POST", "/api/workers/drain", {"worker_ids": ["x"]}, {"admin"}),
    ("POST", "/api/workers/x/resume", None, {"admin"}),
    ("POST", "/api/workers/x/gone", None, {"admin"}),
    ("POST", "/api/workers/prune", None, {"admin"}),
    ("DELETE", "/api/workers/x", None, {"admin"}),
    ("POST", "/api/tokens", {"name": "bob"}, {"admin"}),
    ("GET", "/api/tokens", None, {"admin"}),
    ("DELETE", "/api/tokens/x", None, {"admin"}),
    ("GET", "/api/admin/backup", None, {"admin"}),
    ("POST", "/api/admin/restore", {}, {"admin"}),
    ("POST", "/api/admin/restore/x", None, {"admin"}),
    ("POST", "/api/admin/clock", None, {"admin"}),
]
NAMES = [f"{method} {path}" for method, path, _, _ in ROUTES]
REGISTRATION = {"hostname": "node", "ssh_host_keys": [host_key(1)], "boot_id": "boot-0001", "agent_version": "0.1"}
BODIES = {"/api/register": REGISTRATION, "/api/heartbeat": {"session_id": "session-0001", "seq": 1}}


def is_problem(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["x-request-id"]
    body: dict[str, Any] = reply.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["type"] == "about:blank"
    assert body["title"]
    assert body["detail"]
    return body


async def ask(client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
    return await client.request(method, path, json=BODIES.get(path, body))


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def harness(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Harness]:
    """Give one harness for all tests of this file: refused calls change nothing."""
    path = shutil.copy(migrated_database, tmp_path_factory.mktemp("access") / "orion.db")
    store = Store(f"sqlite:///{path}")
    async with Harness(store) as harness:
        yield harness
    store.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tokens(harness: Harness) -> dict[str, httpx.AsyncClient]:
    agent = await harness.join()
    clients = {role: await harness.new_client("carol", role) for role in ("client", "admin", "join")}
    return clients | {"worker": harness.client(agent.token or "")}


@pytest.mark.parametrize(("method", "path", "body", "roles"), ROUTES, ids=NAMES)
async def test_a_call_without_a_valid_token_is_refused(
    harness: Harness, method: str, path: str, body: dict[str, Any] | None, roles: set[str]
) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": f"Basic {harness.secrets.admin_token}"},
    ):
        reply = await harness.http.request(method, path, json=BODIES.get(path, body), headers=headers)
        is_problem(reply, 401, "unauthorized")
        assert reply.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("method", "path", "body", "roles"), ROUTES, ids=NAMES)
async def test_a_call_allows_its_roles_and_no_other(
    harness: Harness,
    tokens: dict[str, httpx.AsyncClient],
    method: str,
    path: str,
    body: dict[str, Any] | None,
    roles: set[str],
) -> None:
    for role, client in tokens.items():
        reply = await ask(client, method, path, body)
        if role in roles:
            code = reply.json().get("code") if "json" in reply.headers.get("content-type", "") else None
            assert code not in {"unauthorized", "forbidden", "internal_error"}
        else:
            assert role in is_problem(reply, 403, "forbidden")["detail"]


async def test_each_route_of_the_api_is_in_the_access_list(harness: Harness) -> None:
    described = harness.app.openapi()["paths"]
    found = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    listed = {re.sub(r"/(x|8000)\b", "/{}", name) for name in NAMES} | {"GET /healthz"}
    assert {re.sub(r"\{\w+\}", "{}", name) for name in found} == listed


@pytest.mark.parametrize("secret", [None, "", "another", PROXY_SECRET.upper(), PROXY_SECRET + "x"])
@pytest.mark.parametrize("path", ["/api/status", "/api/openapi.json", "/nowhere", "/healthz/", "/HEALTHZ"])
async def test_a_request_that_did_not_come_through_the_proxy_is_refused(
    harness: Harness, secret: str | None, path: str
) -> None:
    headers = {"Authorization": f"Bearer {harness.secrets.admin_token}"} | ({SECRET_HEADER: secret} if secret else {})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(harness.app), base_url="http://manager") as outsider:
        is_problem(await outsider.get(path, headers=headers), 403, "not_through_the_door")


async def test_the_health_check_needs_no_token_and_shows_nothing_else(harness: Harness) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(harness.app), base_url="http://manager") as outsider:
        reply = await outsider.get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
    assert reply.headers["x-request-id"]


async def test_the_openapi_document_needs_only_the_proxy(harness: Harness) -> None:
    assert (await harness.http.get("/api/openapi.json")).json()["info"]["title"] == "Orion-Sec"


async def test_a_reply_carries_the_request_id_that_the_proxy_gave(harness: Harness) -> None:
    given = "0123456789abcdef0123456789abcdef"
    for path in ("/healthz", "/api/status", "/nowhere"):
        assert (await harness.http.get(path, headers={"X-Request-ID": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "short", "a" * 65, "with space", "<script>", "line%0abreak!"])
async def test_an_invalid_request_id_is_replaced(harness: Harness, given: str) -> None:
    reply = await harness.http.get("/healthz", headers={"X-Request-ID": given})
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])


async def test_an_error_of_the_manager_is_a_problem_and_logged_under_the_request_id(
    harness: Harness,
) -> None:
    @harness.app.get("/api/mistake", include_in_schema=False)
    async def mistake() -> None:
        raise RuntimeError("a secret detail")

    given = "0123456789abcdef"
    with capture_logs(processors=[merge_contextvars]) as logs:
        reply = await harness.http.get("/api/mistake", headers={"X-Request-ID": given})
    body = is_problem(reply, 500, "internal_error")
    assert reply.headers["x-request-id"] == given
    assert "a secret detail" not in str(body)
    (story,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert (story["request_id"], story["path"]) == (given, "/api/mistake")
    assert "a secret detail" in str(story["exc_info"])


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/api/rent", 405, "method_not_allowed"),
        ("PATCH", "/api/rentals", 405, "method_not_allowed"),
    ],
)
async def test_an_unknown_path_or_method_is_a_problem(
    harness: Harness, method: str, path: str, status: int, code: str
) -> None:
    is_problem(await harness.as_admin.request(method, path), status, code)


INVALID: list[tuple[str, str, Any, str]] = [
    ("POST", "/api/rent", {"unknown": 1}, "unknown"),
    ("POST", "/api/rent", {"ttl_s": 59}, "ttl_s"),
    ("POST", "/api/rent", {"ttl_s": 30 * 24 * 3600 + 1}, "ttl_s"),
    ("POST", "/api/rent", {"ttl_s": "3600"}, "ttl_s"),
    ("POST", "/api/rent", {"ttl_s": True}, "ttl_s"),
    ("POST", "/api/rent", {"wait_s": 56}, "wait_s"),
    ("POST", "/api/rent", {"wait_s": -1}, "wait_s"),
    ("POST", "/api/rent", {"name": "Über"}, "name"),
    ("POST", "/api/rent", {"name": "-lab"}, "name"),
    ("POST", "/api/rent", {"name": "a" * 41}, "name"),
    ("POST", "/api/rent", {"name": "lab\n"}, "name"),
    ("POST", "/api/rent", {"ssh_public_key": "rubbish"}, "ssh_public_key"),
    ("POST", "/api/rent", {"ssh_public_key": f'command="sh" {host_key(1)}'}, "ssh_public_key"),
    ("POST", "/api/rent", {"ssh_public_key": f"{host_key(1)}\n{host_key(2)}"}, "ssh_public_key"),
    ("POST", "/api/rent", {"labels": {"a b": "c"}}, "labels"),
    ("POST", "/api/rent", {"labels": {f"k{n}": "" for n in range(33)}}, "labels"),
    ("POST", "/api/rent", [], "body"),
    ("POST", "/api/rentals/x/renew", {"ttl_s": 0}, "ttl_s"),
    ("POST", "/api/rentals/x/renew", {"for_ever": True}, "for_ever"),
    ("POST", "/api/tokens", {"name": "bob", "role": "worker"}, "role"),
    ("POST", "/api/tokens", {"role": "client"}, "name"),
    ("POST", "/api/tokens", {"name": "bob", "ttl_s": 1}, "ttl_s"),
    ("GET", "/api/rentals?limit=0", None, "limit"),
    ("GET", "/api/rentals?limit=501", None, "limit"),
    ("GET", "/api/rentals/x?state=gone", None, "state"),
    ("GET", "/api/rentals/x?wait_s=56", None, "wait_s"),
    ("DELETE", "/api/rentals/x?wait_s=nan", None, "wait_s"),
    ("GET", "/api/events?after=-1", None, "after"),
    ("GET", f"/api/events?after={2**63}", None, "after"),
    ("GET", f"/api/workers?after={'a' * 65}", None, "after"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "field"), INVALID, ids=[f"{p} {str(b)[:40]}" for _, p, b, _ in INVALID]
)
async def test_an_invalid_request_is_refused_with_the_name_of_its_field(
    harness: Harness, method: str, path: str, body: Any, field: str
) -> None:
    problem = is_problem(await harness.as_admin.request(method, path, json=body), 422, "invalid_request")
    assert field in problem["detail"]
    assert "should" not in problem["detail"], "the validator's raw words"
    assert problem["errors"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b'{"wait_s": 1e999}', b'{"wait_s": NaN}'])
async def test_a_body_that_is_not_a_json_object_of_the_api_is_refused(harness: Harness, content: bytes) -> None:
    reply = await harness.as_admin.post("/api/rent", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code in {400, 422}
    problem = is_problem(reply, reply.status_code, reply.json()["code"])
    assert "should" not in problem["detail"], "the validator's raw words"


@pytest.mark.parametrize("key", ["", "a" * 256, "with space", "ünïcode"])
async def test_an_idempotency_key_has_a_form(harness: Harness, key: str) -> None:
    headers = {"Idempotency-Key": key.encode()}
    is_problem(await harness.as_admin.post("/api/rent", json={"wait_s": 0}, headers=headers), 422, "invalid_request")
