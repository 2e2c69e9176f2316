"""The shim of orion-rental repeats constants of the RPC server, because it must not import it."""

from __future__ import annotations

import subprocess
import sys

from orion_worker import shim
from orion_worker.rpc import server
from orion_worker.snapshots import transfer


def test_the_shim_and_the_rpc_server_have_the_same_constants() -> None:
    assert (shim.SOCKET_PATH, shim.TRANSFERS, shim.TAKEN) == (server.SOCKET_PATH, server.TRANSFERS, server.TAKEN)
    assert shim.TRANSFERS == transfer.TRANSFERS


def test_the_shim_loads_nothing_of_the_package_before_it_must() -> None:
    program = f"import runpy, sys; runpy.run_path({shim.__file__!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert not [name for name in loaded.stdout.split() if name.startswith(("orion_worker", "socket", "pathlib"))]
