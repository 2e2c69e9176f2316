"""The settings of `make up` are kept for the next one, tried with copies of the scripts that keep them."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUNCTIONS = ("keep_settings", "keep_setting", "unset_empty_settings", "typed_command")
NO_ENGINE = """#!/bin/sh
[ "$1" = ps ] && [ -n "$CONTAINER" ] && echo "$CONTAINER"
[ "$1" = inspect ] && echo "$DIRECTORY"
exit 0
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a clone that contains only the scripts that keep settings, and a stand-in for Docker."""
    place = tmp_path / "clone"
    (place / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/common.sh", place / "scripts")
    shutil.copy(ROOT / "docker-compose.yml", place)
    up = (ROOT / "scripts/up.sh").read_text()
    found = [re.search(rf"^{name}\(\) {{$.*?^}}$", up, re.MULTILINE | re.DOTALL) for name in FUNCTIONS]
    (place / "scripts/kept.sh").write_text(". scripts/common.sh\n" + "\n".join(one[0] for one in found if one) + "\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/docker").write_text(NO_ENGINE)
    (tmp_path / "bin/docker").chmod(0o755)
    return place


def shell(place: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": f"{place.parent / 'bin'}:{os.environ['PATH']}", **environment}
    command = ["bash", "-c", f". scripts/kept.sh; {script}"]
    return subprocess.run(command, env=clean, cwd=place, capture_output=True, text=True, check=False)


def make_up(place: Path, **environment: str) -> None:
    done = shell(place, "load_settings; unset_empty_settings; keep_settings", **environment)
    assert done.returncode == 0, done.stderr


def now_set(place: Path, name: str, **environment: str) -> str:
    return shell(place, f'load_settings; echo "${{{name}:-}}"', **environment).stdout.strip()


def test_every_setting_of_the_compose_file_is_kept() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    settings = set(re.findall(r"\${(ORION_[A-Z_]+)", compose)) | set(re.findall(r"- (ORION_[A-Z_]+)$", compose, re.M))
    source = f'. {ROOT}/scripts/common.sh; printf "%s\\n" "${{KEPT_SETTINGS[@]}}"'
    kept = subprocess.run(["bash", "-c", source], capture_output=True, text=True, check=True).stdout.split()
    assert settings | {"COMPOSE_PROJECT_NAME", "ORION_WORKERS"} == set(kept)
    assert {
        "ORION_SLOTS",
        "ORION_WORKER_MEMORY",
        "ORION_LABELS",
        "ORION_HEARTBEAT_S",
        "ORION_HOME_MAX_BYTES",
    } <= settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ORION_SLOTS", "4"),
        ("ORION_WORKER_MEMORY", "1g"),
        ("ORION_LABELS", "zone=a,gpu=yes"),
        ("ORION_DATABASE_URL", 'postgresql+psycopg://o:p$a#s "s@db/orion'),
    ],
)
def test_a_setting_stays_until_another_one_is_given(checkout: Path, name: str, value: str) -> None:
    make_up(checkout, **{name: value})
    make_up(checkout)
    assert now_set(checkout, name) == value
    assert now_set(checkout, name, **{name: "other"}) == "other"
    make_up(checkout, **{name: ""})
    assert now_set(checkout, name) == ""


def test_the_number_of_workers_stays(checkout: Path) -> None:
    make_up(checkout, WORKERS="5")
    make_up(checkout)
    assert now_set(checkout, "ORION_WORKERS") == "5"


def test_only_its_owner_can_read_the_file_of_kept_settings(checkout: Path) -> None:
    make_up(checkout, ORION_SLOTS="4")
    assert stat.S_IMODE((checkout / ".env").stat().st_mode) == 0o600


def test_a_setting_that_cannot_be_kept_is_refused(checkout: Path) -> None:
    refused = shell(checkout, "load_settings; keep_settings", ORION_LABELS="a=it's")
    assert refused.returncode == 1
    assert "ORION_LABELS cannot be saved" in refused.stderr


def test_the_settings_of_another_platform_do_not_count(checkout: Path) -> None:
    make_up(checkout, ORION_SLOTS="4")
    assert now_set(checkout, "ORION_SLOTS", COMPOSE_PROJECT_NAME="another") == ""
    make_up(checkout, ORION_SLOTS="2", COMPOSE_PROJECT_NAME="another")
    assert now_set(checkout, "ORION_SLOTS") == "4"


def test_another_clone_of_the_same_platform_uses_its_settings(checkout: Path, tmp_path: Path) -> None:
    """The directory is a part of a container's settings for docker-compose 1.29, so the first one is kept."""
    make_up(checkout, ORION_SLOTS="4")
    second = tmp_path / "second"
    shutil.copytree(checkout, second)
    (second / ".env").unlink()
    engine = {"CONTAINER": "0123456789ab", "DIRECTORY": str(checkout)}
    assert now_set(second, "ORION_SLOTS", **engine) == "4"
    assert now_set(second, "FIRST_DIRECTORY", **engine) == str(checkout)
    assert now_set(checkout, "FIRST_DIRECTORY", **engine) == ""


def test_the_typed_settings_are_shown_for_repetition_without_passwords(checkout: Path) -> None:
    given = {"WORKERS": "2", "ORION_LABELS": "a=b c", "ORION_DATABASE_URL": "postgresql://o:secret@db"}
    typed = shell(checkout, "typed_command", **given).stdout.strip()
    assert typed == r'WORKERS=2 ORION_DATABASE_URL="$ORION_DATABASE_URL" ORION_LABELS=a=b\ c make up'
