"""Tests of scripts/engine.sh, with stand-ins for Docker's programs, on a machine whose engine does not run."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "docker": 'case "$1" in info) [ -e "$HERE/pid" ] ;; esac',
    "dockerd": 'echo $$ >"$HERE/new"; mv "$HERE/new" "$HERE/pid"; echo "from the engine"; exec sleep 300',
    "service": "exit 1",
    "systemctl": "exit 1",
}
WITHIN_S = 60


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Path]:
    for name, does in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nHERE={tmp_path}\n{does}\n")
        program.chmod(0o755)
    yield tmp_path
    if (tmp_path / "pid").exists():
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.skipif(os.geteuid() != 0, reason="starting an engine is root's; .ci/run is root")
def test_a_reader_of_the_start_script_s_output_does_not_wait_for_the_end_of_docker(machine: Path) -> None:
    path = f"{machine}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "scripts/engine.sh"],
        env={"PATH": path},
        stdout=subprocess.PIPE,  # read to its end, which comes when every process has closed it
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WITHIN_S,
        check=True,
    )
    os.kill(int((machine / "pid").read_text()), 0)  # the engine lives on
    assert "Starting the Docker engine" in done.stdout
    assert "from the engine" not in done.stdout
