"""The files in which sshd finds the keys of renters, and where these files are while a rental is locked."""

from __future__ import annotations

from pathlib import Path

from orion_worker.rental.paths import WorkerPaths
from orion_worker.system.files import write_atomically


class KeyFiles:
    """The keys of all renters, each file in one of two directories, so that locking and activating are one rename."""

    def __init__(self, paths: WorkerPaths) -> None:
        self._active = paths.keys
        self._locked = paths.locked_keys
        self._active.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._locked.mkdir(mode=0o700, parents=True, exist_ok=True)

    def are_active(self, username: str) -> bool:
        """Return whether sshd finds the keys of this renter."""
        return (self._active / username).exists()

    def exist(self, username: str) -> bool:
        """Return whether the renter has a file of keys, active or locked."""
        return any((folder / username).exists() for folder in (self._locked, self._active))

    def write(self, username: str, text: str, group: int) -> bool:
        """Write the file of keys where the renter's is now; return whether that changed its text."""
        file = (self._active if self.are_active(username) else self._locked) / username
        if file.exists() and file.read_text() == text:
            return False
        write_atomically(file, text, mode=0o640, group=group)
        return True

    def activate(self, username: str) -> bool:
        """Move the keys to where sshd looks; return whether they were locked before."""
        return _move(self._locked / username, self._active / username)

    def lock(self, username: str) -> bool:
        """Move the keys to where sshd does not look; return whether they were active before."""
        return _move(self._active / username, self._locked / username)

    def forget(self, username: str) -> None:
        for folder in (self._active, self._locked):
            (folder / username).unlink(missing_ok=True)


def _move(source: Path, target: Path) -> bool:
    try:
        source.replace(target)
    except FileNotFoundError:
        return False
    return True
