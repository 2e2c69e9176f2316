"""The proxy is the only way in: published ports, and refusals of requests from inside the network."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from stack import ROOT, WORKERS, Stack
from support.patience import PATIENCE_S

from orion.client.sdk import Orion
from orion.errors import Untrusted


def test_only_the_proxy_publishes_ports(stack: Stack) -> None:
    containers = stack.containers()
    assert [one.service for one in containers] == ["manager_app", "manager_proxy", *["worker"] * WORKERS]
    for container in containers:
        described = json.loads(stack.docker("inspect", container.id))[0]
        published = {port for port, where in described["NetworkSettings"]["Ports"].items() if where}
        assert published == ({"80/tcp", "443/tcp"} if container.service == "manager_proxy" else set())
        assert described["HostConfig"]["NetworkMode"] == stack.network
        assert not described["HostConfig"]["Privileged"]


def test_the_proxy_answers_a_health_check(stack: Stack) -> None:
    reply = httpx.get(f"{stack.url}/healthz", timeout=PATIENCE_S, trust_env=False)
    assert reply.status_code == 200
    assert reply.json() == {"status": "ok"}
    assert reply.headers["X-Request-ID"]


def test_a_client_without_a_token_gets_nothing_but_the_health_check(stack: Stack) -> None:
    for path in ("/api/rentals", "/api/workers", "/api/status", "/api/events", "/api/tokens"):
        reply = httpx.get(stack.url + path, timeout=PATIENCE_S, trust_env=False)
        assert reply.status_code == 401
        assert reply.headers["Content-Type"] == "application/problem+json"
        assert reply.json()["code"] == "unauthorized"


@contextmanager
def closed_host(stack: Stack) -> Iterator[None]:
    """Add the machine's packet filter like make up, and remove it afterwards like make clean."""

    def run(what: str) -> str:
        script = f". {ROOT}/scripts/common.sh; . {ROOT}/scripts/host_filter.sh; {what}"
        done = subprocess.run(
            ["bash", "-c", script], env=stack.environment(), capture_output=True, text=True, check=True
        )
        return done.stdout + done.stderr

    assert run("add_host_rules") == ""
    rules = run("as_root iptables -S")
    try:
        assert run("add_host_rules") == ""
        assert run("as_root iptables -S") == rules, "existing rules are not added again"
        yield
    finally:
        run("remove_host_rules")


def test_the_host_s_packet_filter_blocks_only_the_network_of_the_platform(stack: Stack) -> None:
    worker, gateway = stack.container("worker"), str(stack.subnet.network_address + 1)
    try_it = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    with socket.create_server((gateway, 0)) as here:
        ours = str(here.getsockname()[1])

        def reaches(port: str) -> bool:
            return stack.exec(worker.id, "python3", "-c", try_it, gateway, port).returncode == 0

        assert reaches(ours), "root of a worker is in no filter of its own"
        with closed_host(stack):
            assert not reaches(ours)
            assert not reaches(str(stack.http_port)), "nor a port that a container publishes"
            assert httpx.get(f"{stack.url}/healthz", timeout=PATIENCE_S, trust_env=False).status_code == 200
            names = stack.exec(worker.id, "getent", "hosts", "manager_proxy")
            assert names.returncode == 0
            through = stack.exec(worker.id, "curl", "-sS", "--noproxy", "*", "http://manager_proxy/healthz")
            assert json.loads(through.stdout) == {"status": "ok"}
        assert reaches(ours), "the filter is restored"


def test_the_manager_hangs_up_on_a_worker_that_bypasses_the_proxy(stack: Stack) -> None:
    worker = stack.container("worker")
    address = f"http://{stack.app_address}:5000/healthz"
    answer = stack.exec(worker.id, "curl", "-sS", "--noproxy", "*", "--max-time", "30", address)
    assert answer.returncode in {52, 56}, f"neither an empty reply nor a reset: {answer}"
    assert answer.stdout == ""
    through = stack.exec(worker.id, "curl", "-sS", "--noproxy", "*", "--max-time", "30", "http://manager_proxy/healthz")
    assert json.loads(through.stdout) == {"status": "ok"}


@pytest.mark.parametrize("header", ["", "X-Orion-Proxy-Secret: guessed\r\n"], ids=["none", "wrong"])
def test_the_manager_refuses_a_request_without_the_secret_even_from_the_address_of_the_proxy(
    stack: Stack, header: str
) -> None:
    request = f"GET /api/status HTTP/1.0\r\nHost: manager_app\r\n{header}\r\n"
    script = f"exec 3<>/dev/tcp/{stack.app_address}/5000 && cat >&3 && cat <&3"
    answer = stack.exec(stack.container("manager_proxy").id, "timeout", "30", "bash", "-c", script, stdin=request)
    assert " 403 " in answer.stdout.partition("\n")[0], answer
    assert json.loads(answer.stdout.partition("\n\n")[2])["code"] == "not_through_the_door"


def test_https_works_with_the_self_signed_certificate_and_not_without_it(stack: Stack, orion: Orion) -> None:
    token = stack.admin_token()
    certificate = stack.folder / "tls.crt"
    certificate.write_text(stack.secret("manager_proxy", "/etc/orion-tls/tls.crt") + "\n")
    with Orion.at(stack.https_url, token, str(certificate)) as trusting:
        trusting.healthz()
        assert {one.id for one in trusting.workers()} == {one.id for one in orion.workers()}
    with Orion.at(stack.https_url, token) as careful, pytest.raises(Untrusted):
        careful.healthz()
    context = ssl.create_default_context(cafile=str(certificate))
    by_another_name = f"https://127.0.0.2:{stack.https_port}/healthz"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(by_another_name, verify=context, timeout=PATIENCE_S, trust_env=False)
