"""Ask Docker for the containers of the platform and for what is in them, for rollout.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from rollout_plan import WORKER, Container

COMPOSE = str(Path(__file__).resolve().with_name("compose.sh"))
WAY_OF_FILES = "org.orion-sec.files"
"""The label of a worker's image that says how it and the manager carry files."""


class Failed(Exception):
    """Something did not go as it should; the message says what was seen, and what to do."""


def run(*command: str, within_s: float = 180) -> str:
    """Return what it printed. Raise Failed with what it complained of."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(command[-4:])} did not end within {within_s:.0f} s") from error
    if done.returncode:
        raise Failed(f"{' '.join(command[-4:])} failed: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout


def docker(*arguments: str, within_s: float = 180) -> str:
    direct = os.geteuid() == 0 or os.access("/var/run/docker.sock", os.W_OK) or "DOCKER_HOST" in os.environ
    return run(*([] if direct else ["sudo"]), "docker", *arguments, within_s=within_s)


def compose(*arguments: str) -> str:
    return run(COMPOSE, *arguments, within_s=600)


def look() -> list[Container]:
    project = os.environ["COMPOSE_PROJECT_NAME"]
    found = docker("ps", "-aq", "--no-trunc", "--filter", f"label=com.docker.compose.project={project}").split()
    if not found:
        return []
    hashes = dict(line.split() for line in compose("config", "--hash", "*").splitlines() if line.strip())
    described = json.loads(docker("inspect", *found))
    images = {name: _image(name) for name in {one["Config"]["Image"] for one in described}}
    return [_container(one, hashes, images) for one in described if _label(one, "oneoff") != "True"]


def _container(described: dict[str, Any], hashes: dict[str, str], images: dict[str, dict[str, Any]]) -> Container:
    service, image = _label(described, "service"), images[described["Config"]["Image"]]
    same = hashes.get(service) == _label(described, "config-hash") and image.get("Id") in {None, described["Image"]}
    foreign = bool(image) and _way_of_files(image) != _way_of_files(described)
    number, state = _label(described, "container-number"), described["State"]
    restarts = described.get("RestartCount", 0)
    return Container(described["Id"], service, int(number or 0), state["Running"], not same, restarts, foreign)


def _way_of_files(described: dict[str, Any]) -> str:
    return str((described["Config"].get("Labels") or {}).get(WAY_OF_FILES, ""))


def _label(described: dict[str, Any], name: str) -> str:
    return str(described["Config"]["Labels"].get(f"com.docker.compose.{name}", ""))


def _image(name: str) -> dict[str, Any]:
    """Return the image that has a name now, as the engine describes it; empty where there is none any more."""
    try:
        return dict(json.loads(docker("image", "inspect", name))[0])
    except Failed:
        return {}


def is_left_over(container: Container) -> bool:
    """Whether it is a stopped worker of another version on which nothing is: make down has parked what was there."""
    return container.service == WORKER and container.foreign and not container.running and is_empty(container)


def is_empty(container: Container) -> bool:
    """Whether no home of a rental is in it, by the engine's own word: running or not."""
    changed = docker("diff", container.id).splitlines()
    return not any(line.startswith(("A /home/r-", "C /home/r-")) for line in changed)
