"""The real proxy, started from docker-compose.yml alone, in front of a small manager that runs in this process.

The manager listens on the gateway of the test's own network: for the proxy that is where `manager_app` lives.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from support.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
SECRET = "Proxy-secret-of-this-test-" + "7" * 17
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


def compose_command() -> list[str]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


def free_port() -> int:
    """Return a free port below those that the kernel gives to outgoing connections, so that Docker can take it."""
    while True:
        port = 10_000 + secrets.randbelow(10_000)  # tests/e2e uses those from 20,000
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("0.0.0.0", port))  # noqa: S104 - Docker will listen there too
            return port


def wait_until(condition: Callable[[], bool], what: str, within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.1)


@dataclass
class Proxy:
    """One compose project with the service manager_proxy alone."""

    app_host: int
    project: str = field(default_factory=lambda: f"orion-proxytest-{secrets.token_hex(4)}")
    network: str = field(default_factory=lambda: f"10.{130 + secrets.randbelow(60)}.{1 + secrets.randbelow(255)}")
    http_port: int = field(default_factory=free_port)
    https_port: int = field(default_factory=free_port)
    tls_directory: Path | None = None
    trusts_outer: bool = True

    @property
    def outer_address(self) -> str:
        """Return the address of an outer proxy, which is trusted if `trusts_outer`."""
        return f"{self.network}.50"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def app_address(self) -> str:
        return f"{self.network}.{self.app_host}"

    def environment(self) -> dict[str, str]:
        own = {
            "COMPOSE_PROJECT_NAME": self.project,
            "ORION_SUBNET": f"{self.network}.0/24",
            "ORION_GATEWAY": f"{self.network}.1",
            "ORION_PROXY_ADDRESS": f"{self.network}.2",
            "ORION_APP_ADDRESS": self.app_address,
            "ORION_WORKER_RANGE": f"{self.network}.128/25",
            "ORION_HTTP_PORT": str(self.http_port),
            "ORION_HTTPS_PORT": str(self.https_port),
            "ORION_TLS_NAMES": "lab.example,192.0.2.7",
        }
        if self.trusts_outer:
            own["ORION_TRUSTED_PROXIES"] = f"{self.outer_address},2001:db8:ffff::/48"
        if self.tls_directory:
            own["ORION_TLS_DIR"] = str(self.tls_directory)
        return {**os.environ, **own}

    def compose(self, *arguments: str) -> str:
        command = [*compose_command(), "-f", str(ROOT / "docker-compose.yml"), *arguments]
        run = subprocess.run(command, env=self.environment(), cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, f"{command}: {run.stdout}\n{run.stderr}"
        return run.stdout + run.stderr

    def up(self) -> None:
        self.compose("up", "-d", "--build", "--no-deps", "manager_proxy")

    def give_secret(self) -> None:
        """Write the proxy secret, as the manager does at its first start."""
        script = "umask 077; cat > /proxy/secret.new; chmod 700 /proxy; mv /proxy/secret.new /proxy/secret"
        volume = f"{self.project}_proxy_secret:/proxy"
        command = ["docker", "run", "--rm", "-i", "-v", volume, "debian:trixie-slim", "sh", "-c", script]
        subprocess.run(command, input=SECRET.encode(), check=True, capture_output=True)

    def exec(self, *command: str, user: str = "root") -> subprocess.CompletedProcess[str]:
        container = self.compose("ps", "-q", "manager_proxy").strip()
        run = ["docker", "exec", "--user", user, container, *command]
        return subprocess.run(run, capture_output=True, text=True, check=False)

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "manager_proxy")

    def access_log(self) -> list[dict[str, Any]]:
        lines = [line[line.index("{") :] for line in self.logs().splitlines() if '{"time"' in line]
        return [json.loads(line) for line in lines]

    def image(self) -> str:
        container = self.compose("ps", "-q", "manager_proxy").strip()
        shown = subprocess.run(
            ["docker", "inspect", "--format", "{{.Image}}", container], capture_output=True, text=True, check=True
        )
        return shown.stdout.strip()

    def answers(self) -> bool:
        return answers(self.url)

    def down(self) -> None:
        self.compose("down", "--volumes", "--rmi", "local", "--timeout", "3")


OUTER = """
error_log stderr crit;
pid /tmp/outer.pid;
events {{}}
http {{
    map $http_upgrade $outer_connection {{ "" ""; default upgrade; }}
    client_body_temp_path /tmp/b;
    proxy_temp_path /tmp/p;
    fastcgi_temp_path /tmp/f;
    uwsgi_temp_path /tmp/u;
    scgi_temp_path /tmp/s;
    server {{
        listen 8000;
        proxy_http_version 1.1;
        proxy_buffering off;
        proxy_set_header Host $http_host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $outer_connection;
        location /orion/ {{
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $outer_connection;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto https;
            proxy_set_header X-Forwarded-Prefix /orion;
            proxy_pass http://{inner}/;
        }}
        location / {{
            proxy_set_header X-Forwarded-For $http_x_says;
            proxy_pass http://{inner};
        }}
    }}
}}
"""
"""The Nginx of an operator: the platform below /orion/, and elsewhere with any visitor's address that a test gives."""


@contextmanager
def outer_proxy(inner: Proxy, host: int = 50) -> Iterator[str]:
    """Run an Nginx in front of the proxy; yield its URL. `host`: the last part of its address; 50 is trusted."""
    image = inner.image()
    name = f"{inner.project}-outer-{host}"
    command = ["docker", "run", "--detach", "--rm", "--name", name, "--network", f"{inner.project}_orion_net"]
    command += ["--ip", f"{inner.network}.{host}", "--entrypoint", "sh", image, "-c"]
    command += ["printf '%s' \"$0\" > /tmp/outer.conf; exec nginx -c /tmp/outer.conf -g 'daemon off;'"]
    subprocess.run([*command, OUTER.format(inner=f"{inner.network}.2")], check=True, capture_output=True)
    address = f"http://{inner.network}.{host}:8000"
    try:
        wait_until(lambda: answers(f"{address}/"), "the outer proxy answers")
        yield address
    finally:
        subprocess.run(["docker", "rm", "--force", name], check=True, capture_output=True)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def new_proxy(app_host: int, tls_directory: Path | None = None, trusts_outer: bool = True) -> Iterator[Proxy]:
    if not shutil.which("docker"):
        raise RuntimeError("these tests need a Docker engine: make up installs one")
    running = Proxy(app_host=app_host, tls_directory=tls_directory, trusts_outer=trusts_outer)
    try:
        running.up()
        yield running
    except BaseException:
        sys.stderr.write(running.logs())
        raise
    finally:
        running.down()


class EchoManager:
    """A manager that answers with the request that it received (ASGI under uvicorn, as the real one)."""

    def __init__(self, address: str) -> None:
        self.goes_on = threading.Event()
        """Set when the second event may be sent."""
        options = {"interface": "asgi3", "lifespan": "off", "log_level": "critical"}
        config = uvicorn.Config(self._serve, host=address, port=5000, ws="websockets-sansio", **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self._server.started, "the test's manager listens")

    def stop(self) -> None:
        self.goes_on.set()
        self._server.should_exit = True
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "the test's manager still runs, and would answer the next test"

    async def _serve(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _echo_websocket(scope, receive, send)
        elif scope["path"] == "/api/events":
            await _stream(send, self.goes_on)
        elif scope["path"] == "/api/lost":
            send.__self__.transport.abort()  # to fail in uvicorn would be answered with 500
        else:
            await _reflect(scope, receive, send)


async def _reflect(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answer with the received request; the path `/api/answer/NNN` chooses the status."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
    received = {"headers": headers, "method": scope["method"], "path": scope["path"], "size": size}
    received["query"] = scope["query_string"].decode()
    status = int(scope["path"].removeprefix("/api/answer/")) if scope["path"].startswith("/api/answer/") else 200
    own = [(b"x-orion-manager", b"unreachable"), (b"x-request-id", b"forged"), (b"retry-after", b"77")]
    start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json"), *own]}
    await send(start)
    await send({"type": "http.response.body", "body": json.dumps(received).encode()})


async def _stream(send: Send, goes_on: threading.Event) -> None:
    """Send an event, and the next one when `goes_on` is set."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b"id: 1\ndata: {}\n\n", "more_body": True})
    await asyncio.to_thread(goes_on.wait)
    await send({"type": "http.response.body", "body": b"id: 2\ndata: {}\n\n"})


async def _echo_websocket(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    await receive()
    if scope["path"] != "/api/rentals/abc/ssh":
        await send({"type": "websocket.http.response.start", "status": 403, "headers": [(b"x-own", b"yes")]})
        await send({"type": "websocket.http.response.body", "body": b"not yours"})
        return
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": message.get("bytes") or b""})
