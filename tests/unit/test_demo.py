"""The advice of `make demo` on a platform without free slots."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import pytest

from orion.wire import Worker, WorkerHealth
from scripts.demo import Demo, DemoFailed, DemoPlatform, DemoReport


class FullPool:
    """A platform with five ready workers, of which one has a free slot."""

    url = "http://localhost:8080"

    def workers(self) -> list[Any]:
        rows = [{"id": f"w-{n}", "health": WorkerHealth.READY, "slots_free": int(n == 0)} for n in range(5)]
        return [Worker.model_construct(**row) for row in rows]


def test_the_demo_never_advises_fewer_workers_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """WORKERS=3 on a pool of five would have parked two rentals."""
    pool = FullPool()
    monkeypatch.setattr(Demo, "show_command", lambda *_: None)
    with ExitStack() as afterwards:
        demo = Demo(DemoReport(), cast(DemoPlatform, pool), cast(Any, pool), {}, afterwards)
        with pytest.raises(DemoFailed, match=r"WORKERS=6 make up"):
            demo.check_platform(fast=False)
