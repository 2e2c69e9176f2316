"""Child processes that act under a rental's uid.

The snapshot service may change its uid, but may not read what belongs to others. So a child that has become the
rental's uid, and has no other right, reads and writes the rental's snapshots.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from orion.manager.snapshots.lifetime import Lifetime
from orion.manager.snapshots.port import OVER_LIMIT, SnapshotError

UNUSED_IDS_FROM = 4_000_000_000
"""The first of the uids and gids that no account has."""
T = TypeVar("T")


def run_as(uid: int, work: Callable[[], T], lifetime: Lifetime) -> T:
    """Return what `work` returns, as JSON carries it, from a child with this uid. Raise SnapshotError if it fails."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _work_and_exit(uid, work, writing)
    os.close(writing)
    try:
        content = b""
        while lifetime.wait_for(reading) and (part := os.read(reading, 1 << 16)):
            content += part
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    answer: dict[str, Any] = json.loads(content) if content else {"error": "the process ended without an answer"}
    if "error" in answer:
        code = answer.get("code", "failed")
        raise SnapshotError(code, f"the snapshots could not be read or written: {answer['error']}")
    result: T = answer["done"]
    return result


def kill_all_of(uid: int) -> None:
    """Send SIGKILL to all processes of a rental's uid, in one system call, and return when it was sent.

    The sender's real uid is one that no other process has: two senders that run at a time cannot kill each other.
    """
    child = os.fork()
    if child == 0:
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(UNUSED_IDS_FROM, UNUSED_IDS_FROM, UNUSED_IDS_FROM)
            own = UNUSED_IDS_FROM + os.getpid()
            os.setresuid(own, uid, own)
            os.kill(-1, signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)


def _work_and_exit(uid: int, work: Callable[[], Any], writing: int) -> None:
    """Do the work in a child, and write its result; never return."""
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.umask(0o077)
        try:
            answer = {"done": work()}
        except OSError as error:
            answer = {"error": str(error), "code": OVER_LIMIT if error.errno == errno.EFBIG else "failed"}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
