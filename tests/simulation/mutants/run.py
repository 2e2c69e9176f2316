"""`make mutants`: tries every mutant in a copy of the source; a test or the simulation must fail for each.

python -m simulation.mutants.run [--schedules 400] [NAME...]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simulation.mutants.catalogue import ROOT, Mutant, all_mutants

TIMEOUT_S = 600


def caught_by(mutant: Mutant, schedules: int) -> str:
    """Return the test that fails because of the mutant; empty if none does."""
    with tempfile.TemporaryDirectory(prefix="orion-mutant-") as folder:
        copy = Path(folder)
        for part in ("src", "worker", "tests", "playbooks"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        mutant.apply(copy)
        return _tests(copy, mutant.tests) or _simulation(copy, schedules)


def _simulation(copy: Path, schedules: int) -> str:
    command = ["simulation.runner", "--schedules", str(schedules), "--raw"]
    status, output = _run(copy, command)
    if status == 0:
        return ""
    found = re.findall(r"^seed (\d+) breaks: [\d.]+: (.*?): ", output, re.MULTILINE)
    seed, invariant = found[0] if found else ("?", output.strip().splitlines()[-1][:100])
    return f"the simulation, seed {seed}: {invariant}"


def _tests(copy: Path, tests: tuple[str, ...]) -> str:
    if not tests:
        return ""
    status, output = _run(copy, ["pytest", "-q", "-x", "-p", "no:cacheprovider", *tests])
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed[0] if status == 1 and failed else ""


def _run(copy: Path, module: list[str]) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": f"{copy}/src:{copy}/worker:{copy}/tests", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--schedules", type=int, default=400, help="how many the simulation plays for each")
    arguments.add_argument("names", nargs="*")
    wanted = arguments.parse_args()
    mutants = [m for m in all_mutants() if not wanted.names or m.name in wanted.names]
    began = time.perf_counter()

    def try_out(mutant: Mutant) -> bool:
        started = time.perf_counter()
        by = caught_by(mutant, wanted.schedules) if mutant.applies() else ""
        verdict = f"caught by {by}" if by else ("MISSED" if mutant.applies() else "DOES NOT APPLY any more")
        print(f"{mutant.name:<38} {verdict}  ({time.perf_counter() - started:.1f} s)", flush=True)
        return bool(by)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        caught = list(pool.map(try_out, mutants))
    missed = [mutant.name for mutant, is_caught in zip(mutants, caught, strict=True) if not is_caught]
    took_s = time.perf_counter() - began
    print(f"{len(mutants)} mutants, {sum(caught)} caught in {took_s:.0f} s{f', missed: {missed}' if missed else ''}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
