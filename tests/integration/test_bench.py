"""The benchmark works: with figures too small to mean anything, and without engine or load generator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[2]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"} | environment
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, env=kept, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_benchmark_of_growth_writes_its_results_to_a_file(tmp_path: Path) -> None:
    done = bench("growth", "--sizes", "100", "300", "--samples", "3", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "growth.json").read_text())
    measured = {label: [size for size, _ in points] for label, points in results["lines"].items()}
    assert {tuple(sizes) for sizes in measured.values()} == {(100, 300)}, results["details"]
    assert {"memory (MB)", "one heartbeat (ms)", "one decision that led to something (ms)"} <= measured.keys()
    assert all(one["p50"] > 0 for one in results["rows"])
    assert ET.parse(tmp_path / "growth.svg").getroot().tag.endswith("svg")  # noqa: S314 - we made it
    assert "one heartbeat" in done.stdout


def test_without_arguments_all_benchmarks_but_failovers_and_snapshots_run(tmp_path: Path) -> None:
    done = bench("--results", str(tmp_path), PATH=str(tmp_path))
    assert done.returncode != 0
    assert "needs docker and ssh and wrk" in done.stderr


def test_a_benchmark_names_the_programs_that_it_lacks(tmp_path: Path) -> None:
    done = bench("heartbeats", "--results", str(tmp_path), PATH=str(tmp_path))
    assert done.returncode != 0
    assert "needs docker and wrk" in done.stderr
    assert not list(tmp_path.iterdir())
