"""`orion-rental` on a worker, run by ssh for one snapshot or restore, and what it answers.

Requests and answers are JSON lines (orion_worker/snapshots/requests.py); their fields stay as released. After the
answer, the same connection carries rsync's stream (transfer.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from orion.manager.domain.snapshots import SnapshotId
from orion.manager.snapshots.lifetime import Lifetime
from orion.manager.snapshots.port import SnapshotError
from orion.manager.ssh.options import plain

MAX_TEXT_BYTES = 1 << 16
MAX_ANSWER_BYTES = 1 << 17
"""The most bytes of an answer. It may hold 20 names of 200 letters, which take up to 12 bytes each in JSON."""
MAX_FOLDER_MODES_BYTES = 1 << 15
"""The most bytes of the modes of directories. They go back to a worker in a request, which may not be longer."""
MAX_SKIPPED_NAMES = 20
MAX_MESSAGE = 300
LONGEST_S = 3600.0
REACHED_WITHIN_S = 20.0
"""Seconds within which a worker must have been reached and have sent its first line."""
_CODE = re.compile(r"[a-z_]{1,40}")


@dataclass(frozen=True, kw_only=True)
class SnapshotAnswer:
    """The worker's answer to a request for a snapshot. It is trusted only in what it says of that rental's home."""

    same: bool = False
    """Whether the home is the same as the base snapshot, so that no files follow."""
    whole: bool = False
    """Whether the whole home follows, because the worker does not know the base snapshot."""
    after_s: float = 0.0
    """Seconds from the request's arrival at the worker to the start of the snapshot; 0 from an older worker."""
    pause_s: float = 0.0
    """The seconds for which the rental's processes were stopped."""
    skipped: tuple[str, ...] = ()
    folders: dict[str, int] = field(default_factory=dict)
    """The modes that a restore has to give to directories, by path in hexadecimal."""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Self:
        """Return the answer in these fields. Raise SnapshotError if they are not valid."""
        try:
            skipped = tuple(plain(str(name))[:200] for name in list(answer.get("skipped", ()))[:MAX_SKIPPED_NAMES])
            after_s, pause_s = (min(max(0.0, float(answer.get(name, 0))), LONGEST_S) for name in ("after_s", "pause_s"))
            folders = _modes(dict(answer.get("folders", {})))
            return cls(
                same=answer.get("same") is True,
                whole=answer.get("whole") is True,
                after_s=after_s,
                pause_s=pause_s,
                skipped=skipped,
                folders=folders,
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise SnapshotError("unreachable", "the worker cannot be asked: its answer is not one") from error


def _modes(fields: dict[Any, Any]) -> dict[str, int]:
    """Return the modes of directories by path. Raise ValueError for modes that a worker would refuse at a restore."""
    found = {str(path): int(mode) for path, mode in fields.items()}
    for path, mode in found.items():
        names = bytes.fromhex(path).split(b"/")
        if names[0] != b"." or any(name in {b"", b".."} or b"\0" in name for name in names) or path != path.lower():
            raise ValueError("a path is not below the home")
        if not 0 <= mode < 0o10000:
            raise ValueError("a mode is not valid")
    if len(json.dumps(found)) > MAX_FOLDER_MODES_BYTES:
        raise ValueError("there are too many modes")
    return found


class WorkerCommand:
    """One run of `orion-rental` on the worker by ssh. It gets its request at once; leaving the block kills the ssh."""

    def __init__(
        self, *, ssh: Sequence[str], uid: int, environment: dict[str, str], command: str, request: dict[str, Any]
    ) -> None:
        self.process = subprocess.Popen(
            [*ssh, f"orion-rental {command}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            env=environment, cwd="/", user=uid, group=uid, extra_groups=[], start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin  # noqa: S101 - it is a pipe
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def read_answer(self, lifetime: Lifetime) -> dict[str, Any]:
        """Return the answer. Raise SnapshotError if the worker refuses, or is not reached in time.

        The worker sends an empty line as soon as it is reached, and answers later. Without that line, an ssh that is
        agreeing on keys would wait for ever for a worker whose address is gone.
        """
        line = self._line(lifetime, REACHED_WITHIN_S)
        if line == b"\n":
            line = self._line(lifetime)
        try:
            answer = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            reason = "its answer is not one" if line else self._last_error_line(lifetime)
            raise SnapshotError("unreachable", f"the worker cannot be asked: {reason}") from error
        if answer.get("ok") is not True:
            code, restored = str(answer.get("code")), str(answer.get("restored", ""))
            raise SnapshotError(
                code if _CODE.fullmatch(code) else "refused",
                plain(str(answer.get("error", "it was refused")))[:MAX_MESSAGE],
                restored if SnapshotId.parse(restored) else "",
            )
        return answer

    def _line(self, lifetime: Lifetime, within_s: float = float("inf")) -> bytes:
        """Read one line, byte by byte, because the bytes after it are for rsync."""
        assert self.process.stdout  # noqa: S101
        line = b""
        while not line.endswith(b"\n") and len(line) < MAX_ANSWER_BYTES:
            if not lifetime.wait_for(self.process.stdout.fileno(), within_s):
                raise SnapshotError("unreachable", f"the worker cannot be asked: no answer within {within_s:g} s")
            byte = self.process.stdout.read(1)
            if not byte:
                break
            line += byte
        return line

    def _last_error_line(self, lifetime: Lifetime) -> str:
        assert self.process.stderr  # noqa: S101
        lifetime.wait_for(self.process.stderr.fileno())
        text = os.read(self.process.stderr.fileno(), MAX_TEXT_BYTES).decode(errors="replace")
        return plain((text.strip().splitlines() or ["it said nothing"])[-1])[:MAX_MESSAGE]
