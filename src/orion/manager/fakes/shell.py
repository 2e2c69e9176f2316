"""Shells whose output a test writes: the shipped fake of `port.Shells`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from orion.manager.ssh.port import Host, Shell, ShellLogin, ShellUnreachable


@dataclass(eq=False, kw_only=True)
class FakeShell:
    """Implements `port.Shell`."""

    host: Host
    login: ShellLogin
    size: tuple[int, int]
    written: bytearray = field(default_factory=bytearray)
    read_so_far: int = 0
    takes: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the program reads its input."""
    closed: bool = False
    _output: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    _ended: str | None = None

    def __post_init__(self) -> None:
        self.takes.set()

    def say(self, data: bytes) -> None:
        self._output.put_nowait(data)

    def end(self, how: str | None) -> None:
        """End the shell with this description; None means that its connection is lost."""
        self._ended = how
        self._output.put_nowait(b"")

    async def read(self) -> bytes:
        part = await self._output.get()
        self.read_so_far += len(part)
        return part

    async def write(self, data: bytes) -> None:
        await self.takes.wait()
        self.written += data

    def resize(self, columns: int, rows: int) -> None:
        self.size = (columns, rows)

    async def how_it_ended(self) -> str | None:
        return self._ended

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeShells:
    """Implements `port.Shells`, and keeps the shells that it opened."""

    opened: list[FakeShell] = field(default_factory=list)
    refusing: str = ""
    """The message with which `open` fails; empty if it works."""

    async def open(self, host: Host, login: ShellLogin, size: tuple[int, int]) -> Shell:
        if self.refusing:
            raise ShellUnreachable(self.refusing)
        shell = FakeShell(host=host, login=login, size=size)
        self.opened.append(shell)
        return shell
