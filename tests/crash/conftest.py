"""The processes of managers are forked from one that has everything loaded."""

from __future__ import annotations

import os
from pathlib import Path

from crash.stage import PROCESSES

ROOT = Path(__file__).parents[2]

os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("src", "worker", "tests"))
PROCESSES.set_forkserver_preload(["crash.manager", "support.house"])
