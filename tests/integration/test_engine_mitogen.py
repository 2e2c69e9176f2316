"""Mitogen with a hostile child: without the guard it gives away any file; with it, it does not, and still works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, os, sys, time
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
try:
    child = router.local(python_path=sys.executable)
    messages = [mitogen_child.a_route_to_the_engine(child.context_id), mitogen_child.let_me_have(secret)]
    child.call(mitogen_child.tell, messages)
    if guarded:
        works = child.call(len, "abcd")  # answered after all that was said before
    else:
        until = time.monotonic() + 60
        while secret not in files._paths and time.monotonic() < until:
            time.sleep(0.01)
        works = None
    print(json.dumps({"given away": secret in files._paths, "still works": works}), flush=True)
finally:
    os._exit(0)
"""


def told(tmp_path: Path, how: str) -> dict[str, object]:
    secret = tmp_path / "id_ed25519"
    secret.write_text("the key of all workers")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, program, secret, how],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_worker_that_claims_to_be_the_engine_gets_no_file(tmp_path: Path) -> None:
    assert told(tmp_path, "guarded") == {"given away": False, "still works": 4}


def test_mitogen_alone_believes_it(tmp_path: Path) -> None:
    """The reason for the guard, and for `auto` not being Mitogen: when this fails, that may be over."""
    assert told(tmp_path, "bare") == {"given away": True, "still works": None}
