"""`make up` of another clone replaces nothing: the machine's own Compose, with a stand-in for Docker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = """#!/bin/sh
case "$1 $2" in
compose\\ *) exec "$REAL_DOCKER" "$@" ;;
ps\\ *) case "$*" in *.project=orion-sec*) [ ! -e "$MADE/containers" ] || echo 0123456789ab ;; esac ;;
"inspect --format") cat "$MADE/directory" ;;
inspect\\ *) cat "$MADE/containers" ;;
"image inspect") cat "$MADE/image" ;;
esac
"""
"""A stand-in for docker, with the containers that a folder lists. `docker compose` is the machine's own."""
OUTDATED = (
    "import rollout_engine; print(*sorted(one.service for one in rollout_engine.find_containers() if one.outdated))"
)
IMAGE = {"Id": "sha256:0", "Config": {"Labels": {}}}


@dataclass(frozen=True)
class CloneMachine:
    """A machine with one Docker engine, its containers, and clones of this checkout."""

    folder: Path
    environment: Mapping[str, str]

    def clone(self, name: str) -> Path:
        place = self.folder / name
        shutil.copytree(ROOT / "scripts", place / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "docker-compose.yml", place)
        return place

    def make(self, place: Path) -> None:
        """Make the containers of all services as `make up` of that clone would now."""
        describe = self._run(place, "scripts/compose.sh", "config", "--hash", "*")
        hashes = dict(line.split() for line in describe.splitlines())
        made = self.folder / "made"
        (made / "directory").write_text(f"{place}\n")
        (made / "image").write_text(json.dumps([IMAGE]))
        containers = [self._container(service, value) for service, value in hashes.items()]
        (made / "containers").write_text(json.dumps(containers))

    def outdated(self, place: Path, **settings: str) -> list[str]:
        """Return the services that `make up` of that clone would replace."""
        return self._run(place, sys.executable, "-B", "-c", OUTDATED, **settings).split()

    def _run(self, place: Path, *command: str, **settings: str) -> str:
        """Run a command with the settings of scripts/up.sh; return its output."""
        environment = {**self.environment, "PYTHONPATH": str(place / "scripts"), **settings}
        up = ["bash", "-c", '. scripts/common.sh; load_settings; exec "$@"', "up", *command]
        done = subprocess.run(up, env=environment, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @staticmethod
    def _container(service: str, config_hash: str) -> dict[str, object]:
        labels = {"service": service, "config-hash": config_hash, "container-number": "1", "oneoff": "False"}
        labelled = {f"com.docker.compose.{name}": value for name, value in labels.items()}
        state = {"Running": True}
        return {
            "Id": service, "Image": IMAGE["Id"], "State": state, "Config": {"Image": service, "Labels": labelled},
        }  # fmt: skip


class NoImages(BaseHTTPRequestHandler):
    """A Docker engine without images, for docker-compose 1.29, whose hash of the settings includes them."""

    def do_GET(self) -> None:
        describe = {"ApiVersion": "1.41"} if self.path == "/version" else {"message": "No such image"}
        body = json.dumps(describe).encode()
        self.send_response(200 if self.path == "/version" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[CloneMachine]:
    for name in ("bin", "made"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/docker").write_text(DOCKER)
    (tmp_path / "bin/docker").chmod(0o755)
    engine = ThreadingHTTPServer(("127.0.0.1", 0), NoImages)
    threading.Thread(target=engine.serve_forever, args=(0.01,), daemon=True).start()
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "DOCKER_HOST": f"tcp://127.0.0.1:{engine.server_address[1]}",
        "REAL_DOCKER": shutil.which("docker") or "false",
        "MADE": str(tmp_path / "made"),
    }
    yield CloneMachine(tmp_path, environment)
    engine.shutdown()
    engine.server_close()


def has_compose() -> bool:
    if shutil.which("docker-compose"):
        return True
    docker = shutil.which("docker") or "false"
    return subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not has_compose(), reason="needs Docker Compose, 1.29 or 2, but no engine: then it runs")
def test_make_up_of_another_clone_replaces_no_container_and_keeps_the_settings(machine: CloneMachine) -> None:
    """docker-compose 1.29 counts the directory as a setting, so that of the first clone is kept; Compose 2 does not."""
    first, second = machine.clone("first"), machine.clone("second")
    (first / ".env").write_text("ORION_SLOTS=4\n")
    machine.make(first)
    assert machine.outdated(second) == []
    assert machine.outdated(second, ORION_SLOTS="7") == ["worker"]
