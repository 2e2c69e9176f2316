"""The container in which `scripts/compose.sh exec` runs a command, with a stand-in for Docker."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = """#!/bin/bash
case "$1 $2" in
"ps --filter") [[ "$*" == *service=worker* ]] && printf '%s' "$NUMBERS" ;;
"compose version") ;;
"compose --env-file") shift 3; echo "$*" ;;
esac
true
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    return tmp_path


def typed(programs: Path, *words: str, numbers: str) -> subprocess.CompletedProcess[str]:
    clean = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "NUMBERS": numbers,
        "COMPOSE_PROJECT_NAME": "tried",
        "DOCKER_HOST": "none",
    }
    command = [ROOT / "scripts/compose.sh", *words]
    return subprocess.run(command, env=clean, capture_output=True, text=True, check=False)


def test_a_command_runs_in_the_first_container_that_there_is(programs: Path) -> None:
    done = typed(programs, "exec", "-T", "worker", "hostname", "-f", numbers="11\n9\n10\n")
    assert (done.stdout, done.stderr, done.returncode) == ("exec --index=9 -T worker hostname -f\n", "", 0)


def test_an_option_with_a_value_is_not_taken_for_the_service(programs: Path) -> None:
    done = typed(programs, "exec", "-u", "root", "-e", "A=worker", "worker", "id", numbers="4\n")
    assert done.stdout == "exec --index=4 -u root -e A=worker worker id\n"


def test_a_service_without_a_running_container_is_reported(programs: Path) -> None:
    done = typed(programs, "exec", "-T", "worker", "hostname", numbers="")
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr == "orion: no container of worker runs in tried: make up starts the platform\n"


def test_other_commands_are_typed_as_they_are(programs: Path) -> None:
    assert typed(programs, "logs", "worker", numbers="").stdout == "logs worker\n"
