"""The installation of packages with apt, where the network fails for a moment or for good."""

from __future__ import annotations

import os
import subprocess
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Fails once for each line of $STATE/failures, and writes each call into $STATE/calls.
APT_GET = """#!/bin/bash
shift 2 # -o DPkg::Lock::Timeout=...
echo "$*" >>"$STATE/calls"
[ "$1" = install ] || exit 0
[ -s "$STATE/failures" ] || exit 0
echo "E: $(head -n 1 "$STATE/failures")"
sed -i 1d "$STATE/failures"
exit 100
"""

DPKG = """#!/bin/sh
echo "dpkg $*" >>"$STATE/calls"
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    programs = {"apt-get": APT_GET, "dpkg": DPKG, "sleep": "#!/bin/sh\n", "sudo": '#!/bin/sh\nexec "$@"\n'}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def install(machine: Path, *packages: str) -> subprocess.CompletedProcess[str]:
    script = '. "$0/scripts/common.sh"; . "$0/scripts/packages.sh"; install_packages "$@"'
    environment = {"PATH": f"{machine}:{os.environ['PATH']}", "STATE": str(machine)}
    command = ["bash", "-c", script, str(ROOT), *packages]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_package_is_installed_after_outdated_lists_or_an_interrupted_installation(machine: Path) -> None:
    (machine / "failures").write_text("Failed to fetch chromium_1_amd64.deb  404  Not Found\n")
    done = install(machine, "chromium")
    assert done.returncode == 0, done.stderr
    # A machine without new lists gets them before each install besides.
    calls = [call for call, _ in groupby((machine / "calls").read_text().splitlines())]
    again = "install --yes chromium"
    assert calls[calls.index(again) :] == [again, "dpkg --configure --pending", "update", again]


def test_a_reason_that_is_not_from_apt_is_shown_too(machine: Path) -> None:
    (machine / "apt-get").write_text("#!/bin/sh\necho 'a password is required'\nexit 1\n")
    done = install(machine, "tmux")
    assert done.returncode == 1
    assert "a password is required" in done.stderr
    assert "apt-get install tmux failed three times" in done.stderr


def test_an_archive_that_stays_out_of_reach_is_given_up_with_apts_own_reason(machine: Path) -> None:
    (machine / "failures").write_text("Failed to fetch tmux_3_amd64.deb  Connection refused\n" * 3)
    done = install(machine, "tmux")
    assert done.returncode == 1
    assert "E: Failed to fetch tmux_3_amd64.deb  Connection refused" in done.stderr
    assert "apt-get install tmux failed three times, for the reasons above; its whole output: " in done.stderr
    assert (machine / "calls").read_text().count("install --yes tmux") == 3
