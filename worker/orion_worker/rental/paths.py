"""The places of the worker's files."""

from __future__ import annotations

from pathlib import Path


class WorkerPaths:
    """The places that orion-rental uses; `root` is another directory in tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.etc = root / "etc"
        self.homes = root / "home"
        self.app_address = root / "etc/orion/app_address"
        self.keys = root / "etc/orion/keys"
        """The keys that sshd reads as the renter; hence its mode 0711."""
        self.locked_keys = root / "etc/orion/locked"
        """A directory on the same file system as `keys`, so that locking is one rename."""
        self.staging = root / "var/lib/orion-aside"
        """Where files of rentals are staged for a snapshot: root's directory, on the file system of the homes.

        It is not below /var/lib/orion, which is closed to the accounts that send the files.
        """
