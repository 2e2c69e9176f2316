"""The limits and the usage of the container, from its control group of version 2, or 1 where the host has that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT_BYTES = 2**53
"""Bytes from which on a limit of version 1 means "no limit"."""

Read = Callable[[str], str | None]
"""A function that returns the text of a file of the control group by its name; None where there is no such file."""


@dataclass(frozen=True, kw_only=True)
class CgroupUsage:
    """The processors, memory and processes that the container uses, and its limits."""

    cpu_s: float
    """Processor seconds since the container began."""
    memory_used_bytes: int
    memory_limit_bytes: int
    """The limit; 0: there is none."""
    processes: int
    processes_limit: int
    """The limit; 0: there is none."""


def usage(read: Read) -> CgroupUsage:
    if read("cgroup.controllers") is not None:
        cpu_s = _field(read("cpu.stat"), "usage_usec") / 1e6
        memory = _number(read("memory.current")) - _field(read("memory.stat"), "inactive_file")
        memory_limit, processes, processes_limit = read("memory.max"), read("pids.current"), read("pids.max")
    else:
        cpu_s = _number(read("cpuacct/cpuacct.usage")) / 1e9
        memory = _number(read("memory/memory.usage_in_bytes"))
        memory -= _field(read("memory/memory.stat"), "total_inactive_file")
        memory_limit = read("memory/memory.limit_in_bytes")
        processes, processes_limit = read("pids/pids.current"), read("pids/pids.max")
    return CgroupUsage(
        cpu_s=cpu_s,
        memory_used_bytes=max(0, memory),
        memory_limit_bytes=_limit(memory_limit),
        processes=_number(processes),
        processes_limit=_limit(processes_limit),
    )


def read_file(name: str) -> str | None:
    """Return the text of a file of this container's control group; None where there is no such file."""
    try:
        return (CGROUP / name).read_text()
    except OSError:
        return None


def processes_for_each_renter(processes_limit: int, slots: int) -> int:
    """Return how many processes each renter may have: 64 remain for sshd, agent and Ansible, but a renter has 16."""
    return max(16, ((processes_limit or 512) - 64) // slots)


def _number(text: str | None) -> int:
    return int(text) if text and text.strip().isdigit() else 0


def _limit(text: str | None) -> int:
    number = _number(text)
    return number if number < _NO_LIMIT_BYTES else 0


def _field(text: str | None, name: str) -> int:
    """Return the number of a line `name number` in a file of statistics; 0 where there is none."""
    return _number(dict(line.split(" ", 1) for line in (text or "").splitlines() if " " in line).get(name))
