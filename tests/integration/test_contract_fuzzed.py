"""Tests of the API against its OpenAPI document, by schemathesis through the real proxy, role by role.

No answer is a server's error, and none is undocumented in its status, its content type or its schema.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import httpx
import pytest
from platform_support import Platform

from orion import wire

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
"""Accepted and refused values are tested in test_attacks_requests.py: a schema cannot describe a key's data."""

OF_RENTERS = r"/api/(rent.*|events|status)"
OF_OPERATORS = r"/api/(workers.*|tokens|status|admin/backup)|/healthz|/metrics"
"""Without the restore, which restarts the manager: tests/crash/test_restore_drill.py attacks that."""
WITHIN_S = 240
WAIT_S = 0.1


def impatient(contract: dict[str, Any]) -> dict[str, Any]:
    """Return the document with short limits of waiting times."""
    text, found = re.subn(rf'"maximum": {wire.MAX_WAIT_S}(\.0)?\b', f'"maximum": {WAIT_S}', json.dumps(contract))
    assert found
    whole: dict[str, Any] = json.loads(text)
    whole["components"]["schemas"]["RentRequest"]["required"] = ["wait_s"]  # its default is long
    return whole


def fuzz(attacked: Platform, token: str, paths: str) -> None:
    contract = attacked.folder / "openapi.json"
    contract.write_text(json.dumps(impatient(httpx.get(f"{attacked.url}/api/openapi.json", trust_env=False).json())))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(contract), "--url", attacked.url, "--no-color"]
    command += ["--include-path-regex", f"^({paths})$", "--header", f"Authorization: Bearer {token}"]
    command += ["--checks", ",".join(CHECKS), "--max-examples", "15", "--seed", "1", "--request-timeout", "60"]
    command += ["--generation-database", "none", "--max-failures", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False, cwd=attacked.folder)
    shown = "\n".join(line[:400] for line in done.stdout.splitlines())  # a body may fill pages
    assert done.returncode == 0, shown[-12_000:] + done.stderr[-2_000:]
    assert " generated" in done.stdout, done.stdout[-2_000:]


def test_every_call_of_a_renter_answers_as_documented(attacked: Platform) -> None:
    fuzz(attacked, attacked.token("renter"), OF_RENTERS)


@pytest.mark.parametrize("path", ["/api/register", "/api/heartbeat"])
def test_every_call_of_a_worker_answers_as_documented(attacked: Platform, path: str) -> None:
    token = attacked.token("pool", "join") if path == "/api/register" else attacked.worker_token
    fuzz(attacked, token, path)


# Last: these remove workers, and revoke tokens, their own as well.
def test_every_call_of_an_operator_answers_as_documented(attacked: Platform) -> None:
    token = attacked.token("operator", "admin")
    fuzz(attacked, token, OF_OPERATORS)
    fuzz(attacked, token, r"/api/tokens/.*")
