"""Paths"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkerPaths:
    """Where things are; `root` is another directory in tests."""

    root: Path = Path("/")

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    @property
    def keys(self) -> Path:
        """The keys that sshd reads as the renter: hence 0711."""
        return self.root / "etc/orion/keys"

    @property
    def locked_keys(self) -> Path:
        """Beside it, on the same file system, so that locking is one rename."""
        return self.root / "etc/orion/locked"

    @property
    def app_address(self) -> Path:
        return self.root / "etc/orion/app_address"

    @property
    def homes(self) -> Path:
        return self.root / "home"

    @property
    def staging(self) -> Path:
        """Where files of rentals are set aside for a snapshot: root's, and on the file system of the homes.

        Not below /var/lib/orion, which is closed to those who send them.
        """
        return self.root / "var/lib/orion-aside"
