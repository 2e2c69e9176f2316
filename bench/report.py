"""The result of a measurement, as JSON, as a table and as SVG."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pygal
from pygal.style import CleanStyle
from rich import box
from rich.console import Console
from rich.table import Table

from bench.figures import summary

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """One measured value. `p50` is None where nothing was measured, and `note` says why."""

    label: str
    unit: str
    count: int
    p50: float | None
    p95: float | None = None
    p99: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Target:
    """A figure with the bound that it must keep."""

    label: str
    value: float
    wanted: str
    met: bool


@dataclass
class Result:
    """The rows, targets and curves of one measurement."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """The points (size, cost) of each cost, for a measurement over several sizes."""
    details: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def times(self, label: str, seconds: Sequence[float], note: str = "") -> None:
        """Add a row of durations, which are shown in milliseconds."""
        if not seconds:
            self.rows.append(Row(label, "ms", 0, None, note=note or "nothing was measured"))
            return
        found = summary([1000 * value for value in seconds])
        self.rows.append(Row(label, "ms", found.count, found.p50, found.p95, found.p99, note))

    def value(self, label: str, unit: str, value: float, note: str = "") -> None:
        self.rows.append(Row(label, unit, 1, value, note=note))

    def at_most(self, label: str, value: float, most: float, unit: str = "") -> None:
        self.targets.append(Target(label, value, f"at most {most:g}{unit}", value <= most))

    def at_least(self, label: str, value: float, least: float, unit: str = "") -> None:
        self.targets.append(Target(label, value, f"at least {least:g}{unit}", value >= least))


def machine() -> dict[str, Any]:
    """Return what describes the machine and the moment. The load shows whether other programs were running."""
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": revision.stdout.strip() or "unknown",
        "processors": os.cpu_count(),
        "processor": _processor(),
        "load_before": [round(one, 2) for one in os.getloadavg()],
        "kernel": platform.release(),
    }


def keep(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result.name}.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
    (folder / f"{result.name}.svg").write_bytes(_curves(result) if result.lines else _bars(result))


def show(result: Result, console: Console) -> None:
    console.print(f"{result.title}. Load of the machine before: {result.machine['load_before'][0]:g}", highlight=False)
    console.print(_by_size(result) if result.lines else _by_row(result))
    for target in result.targets:
        word = "reached" if target.met else "NOT REACHED"
        console.print(f"  {word}: {target.label}: {_figure(target.value)} ({target.wanted})", highlight=False)
    console.print()


def _by_row(result: Result) -> Table:
    table = _table("", "unit", "n", "p50", "p95", "p99", "")
    for row in result.rows:
        shown = (_figure(row.p50), _figure(row.p95), _figure(row.p99))
        table.add_row(row.label, row.unit, str(row.count), *shown, row.note)
    return table


def _by_size(result: Result) -> Table:
    """Return a table of the medians, with a column for each size."""
    sizes = sorted({size for points in result.lines.values() for size, _ in points})
    table = _table("p50 by number of workers", *(f"{size:,.0f}" for size in sizes))
    for label, points in result.lines.items():
        at = dict(points)
        table.add_row(label, *(_figure(at.get(size)) for size in sizes))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _bars(result: Result) -> bytes:
    """Draw the three percentiles of each row of durations side by side, on a logarithmic scale."""
    rows = [row for row in result.rows if row.unit == "ms" and row.p99]
    chart = pygal.HorizontalBar(**_options(result), x_title="milliseconds", height=140 + 70 * len(rows))
    chart.x_labels = [row.label for row in reversed(rows)]
    for name in ("p99", "p95", "p50"):
        chart.add(name, [round(getattr(row, name), 2) for row in reversed(rows)])
    drawn: bytes = chart.render()
    return drawn


def _curves(result: Result) -> bytes:
    chart = pygal.XY(**_options(result), xrange=None, x_title="registered workers, and as many rentals", height=620)
    for label, points in result.lines.items():
        chart.add(label, points)
    drawn: bytes = chart.render()
    return drawn


def _options(result: Result) -> dict[str, Any]:
    """Return the options of a chart, without scripts and fonts of other sites."""
    return {
        "title": f"{result.title} ({result.machine['at'][:10]}, {result.machine['commit']})",
        "style": CleanStyle,
        "js": (),
        "width": 1000,
        "logarithmic": True,
        "legend_at_bottom": True,
        "truncate_label": -1,
        "truncate_legend": -1,
        "disable_xml_declaration": False,
        "no_prefix": True,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
