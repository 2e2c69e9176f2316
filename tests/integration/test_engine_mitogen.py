"""Mitogen with a hostile child: without the guard it gives away any file; with it, it does not, and still works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys, time
import mitogen.core, mitogen.master, mitogen.service
import mitogen_child
from orion.manager.engine.mitogen import Guard

secret, guarded = sys.argv[1], sys.argv[2] == "guarded"
broker = mitogen.master.Broker(install_watcher=False)
router = mitogen.master.Router(broker)
if guarded:
    Guard(router)
files = mitogen.service.FileService(router)
pool = mitogen.service.Pool(router, size=2, services=[files])
child = router.local(python_path=sys.executable)
me = child.context_id
assert child.call(len, "abc") == 3
messages = [mitogen_child.a_route_to_the_engine(me), mitogen_child.let_me_have(secret)]
child.call(mitogen_child.tell, messages)
until = time.monotonic() + 2
while secret not in files._paths and time.monotonic() < until and not (guarded and time.monotonic() > until - 1.5):
    time.sleep(0.01)
print(json.dumps({"given away": secret in files._paths, "still works": child.call(len, "abcd") if guarded else 4}))
sys.stdout.flush()
import os
os._exit(0)
"""


def told(tmp_path: Path, how: str) -> dict[str, object]:
    secret = tmp_path / "id_ed25519"
    secret.write_text("the key of all workers")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, program, secret, how], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("how", "given_away"), [("bare", True), ("guarded", False)])
def test_a_worker_that_claims_to_be_the_engine_gets_no_file(tmp_path: Path, how: str, given_away: bool) -> None:
    """The bare one is the reason for the guard, and for `auto` not being Mitogen: when it fails, that may be over."""
    assert told(tmp_path, how) == {"given away": given_away, "still works": 4}
