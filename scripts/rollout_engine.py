"""Ask Docker for the containers of the platform and for what is in them, for rollout.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from rollout_plan import WORKER, PlatformContainer

COMPOSE = str(Path(__file__).resolve().with_name("compose.sh"))
FILE_PROTOCOL_LABEL = "org.orion-sec.files"
"""The label of a worker's image with the version of the protocol by which worker and manager transfer files."""


class RolloutError(Exception):
    """A step of the rollout failed. The message says what was observed, and what the user can do."""


def run(*command: str, within_s: float = 180) -> str:
    """Return the command's output. Raise RolloutError with its error output if it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RolloutError(f"{' '.join(command[-4:])} did not end within {within_s:.0f} s") from error
    if done.returncode:
        raise RolloutError(f"{' '.join(command[-4:])} failed: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout


def docker(*arguments: str, within_s: float = 180) -> str:
    direct = os.geteuid() == 0 or os.access("/var/run/docker.sock", os.W_OK) or "DOCKER_HOST" in os.environ
    return run(*([] if direct else ["sudo"]), "docker", *arguments, within_s=within_s)


def compose(*arguments: str) -> str:
    return run(COMPOSE, *arguments, within_s=600)


def find_containers() -> list[PlatformContainer]:
    project = os.environ["COMPOSE_PROJECT_NAME"]
    found = docker("ps", "-aq", "--no-trunc", "--filter", f"label=com.docker.compose.project={project}").split()
    if not found:
        return []
    hashes = dict(line.split() for line in compose("config", "--hash", "*").splitlines() if line.strip())
    described = json.loads(docker("inspect", *found))
    images = {name: _image(name) for name in {one["Config"]["Image"] for one in described}}
    return [_container(one, hashes, images) for one in described if _label(one, "oneoff") != "True"]


def _container(
    described: dict[str, Any], hashes: dict[str, str], images: dict[str, dict[str, Any]]
) -> PlatformContainer:
    service, image = _label(described, "service"), images[described["Config"]["Image"]]
    same = hashes.get(service) == _label(described, "config-hash") and image.get("Id") in {None, described["Image"]}
    incompatible = bool(image) and _file_protocol(image) != _file_protocol(described)
    number, state = _label(described, "container-number"), described["State"]
    restarts = described.get("RestartCount", 0)
    return PlatformContainer(
        described["Id"], service, int(number or 0), state["Running"], not same, restarts, incompatible
    )


def _file_protocol(described: dict[str, Any]) -> str:
    return str((described["Config"].get("Labels") or {}).get(FILE_PROTOCOL_LABEL, ""))


def _label(described: dict[str, Any], name: str) -> str:
    return str(described["Config"]["Labels"].get(f"com.docker.compose.{name}", ""))


def _image(name: str) -> dict[str, Any]:
    """Return the engine's description of the image that has this name now, or {} if there is no such image."""
    try:
        return dict(json.loads(docker("image", "inspect", name))[0])
    except RolloutError:
        return {}


def is_emptied_by_down(container: PlatformContainer) -> bool:
    """Return whether this is a stopped worker of an incompatible version without rentals: make down has parked them."""
    return container.service == WORKER and container.incompatible and not container.running and is_empty(container)


def is_empty(container: PlatformContainer) -> bool:
    """Return whether the container has no home of a rental, running or not, according to the engine."""
    changed = docker("diff", container.id).splitlines()
    return not any(line.startswith(("A /home/r-", "C /home/r-")) for line in changed)
