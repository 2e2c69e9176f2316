"""The program that starts sshd: sshd cannot write below /proc, begins with its score, and is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from orion_worker.agent import confined
from orion_worker.agent.confined import ConfinedCommand
from orion_worker.start import confine
from orion_worker.start.confine import writable
from orion_worker.system import processes

SCORE = 500
WITHIN_S = 60.0


def why_not() -> str:
    """Return why this machine has no Landlock, else nothing. Another process tries it: confinement cannot be undone."""
    command = [sys.executable, "-c", "from orion_worker.start import confine; print(confine.confine())"]
    environment = os.environ | {"PYTHONPATH": str(Path(confine.__file__).parents[2])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


WHY_NOT = why_not()
needs_landlock = pytest.mark.skipif(
    bool(WHY_NOT), reason=f"{WHY_NOT}: runs where the kernel (5.19 or newer) and the engine have Landlock"
)


@pytest.fixture
def begun() -> Iterator[Callable[[str], ConfinedCommand]]:
    """Return a function that makes a ConfinedCommand of a shell script, without starting it."""
    kept: list[ConfinedCommand] = []

    def begin(script: str) -> ConfinedCommand:
        kept.append(ConfinedCommand(["sh", "-c", script], SCORE))
        return kept[-1]

    yield begin
    for each in kept:
        each.stop()
        each._program.kill()
        each._program.wait()


def until(look: Callable[[], Any]) -> Any:
    last_moment = time.monotonic() + WITHIN_S
    while not (found := look()):
        assert time.monotonic() < last_moment
        time.sleep(0.01)
    return found


def written(file: Path) -> str:
    with suppress(FileNotFoundError):
        return file.read_text().strip()
    return ""


def test_every_directory_of_the_root_but_proc_is_writable(tmp_path: Path) -> None:
    for name in ("dev/mqueue", "etc", "home", "proc", "usr/bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "file").touch()
    assert writable(tmp_path) == [str(tmp_path / name) for name in ("dev", "etc", "home", "usr", "dev/mqueue")]


@needs_landlock
def test_the_command_cannot_lower_a_score_and_works_otherwise(
    begun: Callable[[str], ConfinedCommand], tmp_path: Path
) -> None:
    tries = """
        for one in self $$; do (echo 499 > /proc/$one/oom_score_adj) && echo lowered; done
        (echo 15 > /proc/self/oom_adj) && echo lowered
        sh -c '(echo 499 > /proc/self/oom_score_adj) && echo lowered by a child'
        mkdir one two && echo kept > one/file && ln one/file two/link && mv one/file two/file && mv two three
        cat three/file three/link /proc/self/oom_score_adj && head -n 1 /proc/$$/maps > /dev/null && echo seen
    """
    kept = begun(f"cd {tmp_path}; ({tries}) > told 2> refused; echo over > over")
    kept.start()
    until(lambda: written(tmp_path / "over"))
    assert written(tmp_path / "told").split("\n") == ["kept", "kept", str(SCORE), "seen"]
    assert written(tmp_path / "refused").count("Permission denied") >= 3


def test_the_command_begins_with_its_score_and_its_starter_returns_to_its_own(
    begun: Callable[[str], ConfinedCommand], tmp_path: Path
) -> None:
    kept = begun(f"cat /proc/self/oom_score_adj > {tmp_path}/score; exec sleep 60")
    kept.start()
    assert until(lambda: written(tmp_path / "score")) == str(SCORE)
    starter = processes.PROC / str(kept._program.pid) / processes.SCORE
    assert int(starter.read_text()) == processes.own_score()


def test_the_end_of_the_confined_command_is_reported_once_and_it_can_be_started_again(
    begun: Callable[[str], ConfinedCommand], tmp_path: Path
) -> None:
    kept = begun(f"echo life >> {tmp_path}/lives; kill -9 $$")
    for _ in range(2):
        kept.start()
        assert until(kept.ended) == "-9"
        assert kept.ended() is None
    assert written(tmp_path / "lives") == "life\nlife"


def test_processes_of_an_earlier_run_can_be_looked_into(
    begun: Callable[[str], ConfinedCommand], tmp_path: Path
) -> None:
    """A renter's debugger and a snapshot do this; with another domain of Landlock they could not."""
    left = f"{tmp_path}/left"
    kept = begun(
        f"if [ -e {left} ]; then head -n 1 /proc/$(cat {left})/maps > {tmp_path}/maps; exit; fi; "
        f"sleep 60 & until grep -q sleep /proc/$!/comm; do :; done; echo $! > {left}"
    )
    kept.start()
    until(kept.ended)
    kept.start()
    until(kept.ended)
    os.kill(int(written(tmp_path / "left")), signal.SIGKILL)
    assert "sleep" in written(tmp_path / "maps")


def test_a_missing_command_ends_as_any_other(begun: Callable[[str], ConfinedCommand]) -> None:
    kept = begun("exec /nowhere")
    kept.start()
    assert until(kept.ended) == "127"


def test_confine_may_die_and_the_command_never_runs_twice(
    begun: Callable[[str], ConfinedCommand], tmp_path: Path
) -> None:
    kept = begun(f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 60")
    kept.start()
    first = int(until(lambda: written(tmp_path / "pid")))
    (tmp_path / "pid").unlink()
    kept._program.kill()
    assert until(kept.ended) == "unknown"
    until(lambda: not processes.owners(processes._status(first)))
    kept.start()
    assert int(until(lambda: written(tmp_path / "pid"))) != first
    assert kept.ended() is None


def test_a_command_is_stopped_even_if_it_ignores_sigterm(
    begun: Callable[[str], ConfinedCommand], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confined, "STOPS_WITHIN_S", 0.0)
    for script in ("exec sleep 60", "trap '' TERM; while :; do sleep 60; done"):
        kept = begun(script)
        kept.start()
        kept.stop()
        assert until(kept.ended) in {"-9", "-15"}
        kept.stop()
