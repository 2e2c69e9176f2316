"""The processor time and the memory of processes, from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(*pids: int) -> float:
    """Return the processor seconds that these processes and their descendants have used so far."""
    total = 0.0
    for pid in family(*pids):
        with suppress(OSError, IndexError):
            total += sum(int(field) for field in _fields(pid)[11:13]) / _TICKS_PER_S
    return total


def memory_mb(pid: int) -> float:
    """Return the memory of a process now (VmRSS), in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(f"process {pid} has ended")


def family(*pids: int) -> set[int]:
    """Return the living ones of these processes and of their descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError):
                parents[int(entry.name)] = int(_fields(int(entry.name))[1])
    found = set(pids) & parents.keys()
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _fields(pid: int) -> list[str]:
    # The second field is the program's name in brackets, and may itself hold spaces and brackets.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
