"""Opening, reading and writing the worker's own files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Give this descriptor, and close it at the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def text_of(file: Path) -> str:
    """Return the text of a file; empty where there is no such file."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def write_atomically(file: Path, text: str, mode: int = 0o600, group: int = -1, owner: int = -1) -> None:
    """Write a file so that it holds the whole text or what it held before, whenever the machine stops.

    `group`, `owner`: -1 means those of this process.
    """
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        os.fchown(descriptor, owner, group)
        os.fchmod(descriptor, mode)
        stream.write(text)
        stream.flush()
        os.fsync(descriptor)
    new.replace(file)
