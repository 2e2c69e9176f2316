"""`python -m bench [rent burst sessions keystrokes heartbeats growth watch strangers snapshots failover]`.

Measure, show and keep. Without a name, measure all parts but those that take long.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench import burst, failover, growth, heartbeats, keystrokes, rent, sessions, snapshots, strangers, watch
from bench.report import RESULTS, Result, keep, machine, show

NEEDS = {
    "rent": ("docker",),
    "burst": ("docker",),
    "sessions": ("docker",),
    "keystrokes": ("docker", "ssh"),
    "heartbeats": ("docker", "wrk"),
    "growth": (),
    "watch": (),
    "strangers": ("docker", "ssh", "ip"),
    "snapshots": ("docker",),
    "failover": ("docker",),
}
BY_THEMSELVES = ("strangers", "snapshots", "failover")
"""The parts that take long or disturb other programs of this machine: they are measured only by their names."""


def main() -> int:
    # SIGTERM ends as Ctrl-C does: everything that was started is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = _arguments()
    parts: dict[str, Callable[[], Result]] = {
        "rent": lambda: rent.measure(arguments.rounds, arguments.seconds),
        "burst": lambda: burst.measure(arguments.rents),
        "sessions": lambda: sessions.measure(arguments.openings, arguments.copies),
        "keystrokes": lambda: keystrokes.measure(arguments.keys),
        "heartbeats": lambda: heartbeats.measure(arguments.workers, arguments.load_s),
        "growth": lambda: growth.measure(arguments.sizes, arguments.samples),
        "watch": lambda: watch.measure(arguments.watches),
        "strangers": lambda: strangers.measure(arguments.keys),
        "snapshots": lambda: snapshots.measure(arguments.megabytes, arguments.case_s, arguments.interval_s),
        "failover": lambda: failover.measure(arguments.runs, arguments.cases, arguments.homes),
    }
    chosen = arguments.parts or [part for part in parts if part not in BY_THEMSELVES]
    missing = {need for part in chosen for need in NEEDS[part] if not _is_installed(need)}
    if missing:
        sys.exit(f"bench: needs {' and '.join(sorted(missing))}: make bench installs what is missing")
    console = Console()
    failed = False
    for part in chosen:
        found = machine()
        if found["load_before"][0] > 0.5 * (os.cpu_count() or 1):
            console.print(f"bench: the machine is busy (load {found['load_before'][0]}): ratios hold better than times")
        result = parts[part]()
        result.machine = found
        keep(result, arguments.results)
        show(result, console)
        failed |= not all(target.met for target in result.targets)
    console.print(f"bench: JSON and SVG are in {arguments.results}", highlight=False)
    return 1 if failed and arguments.strict else 0


def _part(name: str) -> str:
    """Return the name of a part. Raise for another name; `choices` would refuse an empty list too."""
    if name not in NEEDS:
        raise argparse.ArgumentTypeError(f"there is no {name}, but {', '.join(NEEDS)}")
    return name


def _is_installed(program: str) -> bool:
    if program == "docker":
        return _answers(["docker", "info"])
    return bool(shutil.which(program))


def _answers(command: list[str]) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("parts", nargs="*", type=_part, metavar="PART", help=f"of {', '.join(NEEDS)}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for JSON and SVG")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is not reached")
    parser.add_argument("--rounds", type=int, default=100, help="rent: rounds")
    parser.add_argument("--seconds", type=float, default=110, help="rent: seconds at most")
    parser.add_argument("--rents", type=int, default=200, help="burst: rents at once")
    parser.add_argument("--openings", type=int, default=40, help="sessions: rounds of opening one")
    parser.add_argument("--copies", type=int, default=5, help="sessions: rounds of copying 1 GB")
    parser.add_argument("--keys", type=int, default=500, help="keystrokes, strangers: keys for each case")
    parser.add_argument("--workers", type=int, default=5000, help="heartbeats: simulated workers")
    parser.add_argument("--load-s", type=float, default=8, help="heartbeats: seconds of a round of load")
    parser.add_argument("--samples", type=int, default=100, help="growth: calls of each kind for each size")
    parser.add_argument("--runs", type=int, default=20, help="failover: runs of each case")
    cases = failover.CASES
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, help="failover: the cases to measure")
    homes = tuple(failover.HOMES)
    parser.add_argument("--homes", nargs="+", choices=homes, default=homes, help="failover: the homes to migrate")
    sizes = snapshots.SIZES_MB
    parser.add_argument("--megabytes", type=int, nargs="+", default=sizes, help="snapshots: sizes of homes")
    parser.add_argument("--case-s", type=float, default=45, help="snapshots: seconds of each case")
    parser.add_argument("--interval-s", type=float, default=10, help="snapshots: seconds between two snapshots")
    parser.add_argument("--watches", type=int, default=1000, help="watch: liveness connections")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[100, 1000, 10_000, 100_000], help="growth: registered workers"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
