"""The start of the manager's container: secrets whole or not at all, children that are not root, one orderly end."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
from support.patience import PATIENCE_S

FILE = Path(__file__).parents[2] / "manager_app" / "entrypoint.py"

MANAGER = 1_900_000_000 + os.getpid()
ENGINE = MANAGER + 4_194_304
FILES = ENGINE + 4_194_304
"""An unused uid: the supervisor kills all processes of the engine's uid. Outside of a container, the uids of the image
are also those of every container that runs beside this test."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="starting a child under another uid needs root; CI is root")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("orion_entrypoint", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


entrypoint = load()


@pytest.fixture
def places(tmp_path: Path) -> Any:
    """Return directories of the tests' user, so that the tests need no privileges."""
    me = entrypoint.Account(os.geteuid(), os.getegid())
    everybody = {"root": me, "manager": me, "engine": me, "files": me}
    return entrypoint.Directories(
        tmp_path / "data", tmp_path / "join", tmp_path / "proxy", tmp_path / "run", **everybody
    )


def secret_files(places: Any) -> dict[Path, re.Pattern[str]]:
    token = r"orion_{0}_{0}_[A-Za-z0-9]{{43}}\n"
    return {
        places.data / "secrets/admin_token": re.compile(token.format("admin")),
        places.join / "token": re.compile(token.format("join")),
        places.proxy / "secret": re.compile(r"[A-Za-z0-9]{43}\n"),
        places.data / "secrets/ssh_key": re.compile(
            r"-----BEGIN OPENSSH.*-----END OPENSSH PRIVATE KEY-----\n", re.DOTALL
        ),
        places.data / "secrets/ssh_host_authority": re.compile(r"-----BEGIN OPENSSH.*KEY-----\n", re.DOTALL),
        places.data / "secrets/ssh_user_authority": re.compile(r"-----BEGIN OPENSSH.*KEY-----\n", re.DOTALL),
        places.data / "secrets/ssh_key.pub": re.compile(r"ssh-ed25519 AAAA\S+ orion-manager\n"),
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_start_makes_every_secret_readable_by_root_only(places: Any) -> None:
    entrypoint.prepare(places)
    for file, form in secret_files(places).items():
        assert form.fullmatch(file.read_text()), file
        assert (mode(file), mode(file.parent)) == (0o600, 0o700)


def test_the_manager_receives_the_secrets_that_are_in_the_files(places: Any) -> None:
    secrets = entrypoint.prepare(places)
    authorities = ["host_authority", "user_authority"]
    tokens = ["admin_token", "join_token", "proxy_secret"]
    assert sorted(secrets) == sorted([*authorities, *tokens, "ssh_private_key", "ssh_public_key"])
    assert secrets["admin_token"] == (places.data / "secrets/admin_token").read_text().strip()
    assert secrets["ssh_private_key"] == (places.data / "secrets/ssh_key").read_text()


def test_a_second_start_keeps_every_secret(places: Any) -> None:
    first = entrypoint.prepare(places)
    assert entrypoint.prepare(places) == first


def test_the_engine_gets_its_own_ssh_key_file_and_a_directory_for_its_socket(places: Any) -> None:
    secrets = entrypoint.prepare(places)
    copy = places.run / "engine" / "id_ed25519"
    assert copy.read_text() == secrets["ssh_private_key"]
    assert (mode(copy), mode(copy.parent), mode(places.run)) == (0o600, 0o700, 0o2750)


def test_the_snapshot_service_gets_a_directory_for_snapshots_and_its_own_ssh_key_file(places: Any) -> None:
    secrets = entrypoint.prepare(places)
    copy = places.snapshot_service / "ssh" / "id_ed25519"
    assert copy.read_text() == secrets["ssh_private_key"]
    assert (mode(copy), mode(copy.parent), mode(places.snapshot_service), mode(places.data / "copies")) == (
        *(0o600, 0o700, 0o711, 0o711),
    )


def test_a_start_restores_permissions_that_were_widened(places: Any) -> None:
    entrypoint.prepare(places)
    for directory in (places.data / "secrets", places.join, places.proxy, places.data / "database"):
        directory.chmod(0o755)
    entrypoint.prepare(places)
    assert {mode(d) for d in (places.data / "secrets", places.join, places.proxy, places.data / "database")} == {0o700}


@pytest.mark.parametrize("content", ["", "orion_admin_admin_short", "something precious"])
def test_an_invalid_secret_file_is_not_replaced_and_prevents_the_start(places: Any, content: str) -> None:
    entrypoint.prepare(places)
    token = places.data / "secrets/admin_token"
    token.write_text(content)
    with pytest.raises(ValueError, match="admin_token does not contain a valid secret"):
        entrypoint.prepare(places)
    assert token.read_text() == content


def test_a_start_killed_at_any_instant_leaves_no_partial_secret_and_the_next_start_completes_it(places: Any) -> None:
    """Run the start in a child that dies at its n-th line, for each n until the start succeeds."""
    key = entrypoint.make_ssh_key()
    survivors: dict[Path, str] = {}
    for line in range(1, 2000):
        ended = die_at(line, lambda: _prepare_with(places, key))
        for file, form in secret_files(places).items():
            if file.exists():
                content = file.read_text()
                assert form.fullmatch(content), f"{file} after {line} lines"
                assert survivors.setdefault(file, content) == content
        if ended:
            break
        for directory in (
            (places.data, places.join, places.proxy, places.run, places.snapshot_service) if line % 7 == 0 else ()
        ):
            shutil.rmtree(directory, ignore_errors=True)  # now and then from the very beginning
            survivors.clear()
    else:
        pytest.fail("it never came to its end")
    assert set(survivors) == set(secret_files(places))


def _prepare_with(places: Any, key: str) -> None:
    """Making a key takes long, and public_half must fit it; both are ssh-keygen's and not interrupted here."""
    entrypoint.make_ssh_key = lambda: key
    entrypoint.prepare(places)


def die_at(line: int, work: Callable[[], None]) -> bool:
    """Return whether the work ended before its n-th line."""
    pid = os.fork()
    if pid == 0:
        left = line

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != str(FILE):
                return None
            left -= event == "line"
            if left == 0:
                os._exit(1)
            return trace

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.settrace(trace)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


SUPERVISE = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
import entrypoint
from entrypoint import Account, Directories, Supervisor, helpers
entrypoint.HELPER_GRACE_S = float(sys.argv[3])
os.umask(0o077)
places = Directories(run=Path(sys.argv[2]), manager=Account({MANAGER}, {MANAGER}), engine=Account({ENGINE}, {ENGINE}))
manager, engine, snapshots = (["sh", "-c", script] for script in sys.argv[4:])
real = dict(zip(("engine", "snapshots"), helpers(places)))
mine = (
    replace(real["engine"], command=engine, home=places.run),
    replace(real["snapshots"], command=snapshots, home=places.run, orphans_uid={FILES}),
)
sys.exit(Supervisor(places, manager, mine, {{"admin_token": "x"}}).run())
"""


class EntrypointContainer:
    """The supervisor in a process of its own, with shell scripts for children."""

    def __init__(self, directory: Path, grace_s: float, manager: str, engine: str, snapshot_service: str) -> None:
        self.directory = directory
        arguments = [sys.executable, "-c", SUPERVISE, str(FILE.parent), str(directory), str(grace_s)]
        arguments += [manager, engine, snapshot_service]
        self.process = subprocess.Popen(
            arguments,
            cwd=directory,
            env=os.environ | {"ORION_HEARTBEAT_S": "3", "ORION_PLAYBOOKS": "/playbooks", "PASSWORD": "hidden"},
            stderr=(directory / "log").open("w"),
        )

    def ended(self) -> int:
        return self.process.wait(PATIENCE_S)

    def read(self, name: str) -> str:
        """Wait until a child has written a whole line into the file; return the file's text."""
        deadline = time.monotonic() + PATIENCE_S
        while not (self.directory / name).exists() or not (self.directory / name).read_text().endswith("\n"):
            assert time.monotonic() < deadline, name
            os.sched_yield()
        return (self.directory / name).read_text()


@pytest.fixture
def run() -> Iterator[Callable[..., EntrypointContainer]]:
    """Yield a function that starts containers in a directory that every uid can write to, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    started: list[EntrypointContainer] = []

    def start(
        manager: str,
        engine: str = "exec sleep 600",
        snapshot_service: str = "exec sleep 600",
        grace_s: float = PATIENCE_S,
    ) -> EntrypointContainer:
        started.append(EntrypointContainer(directory, grace_s, manager, engine, snapshot_service))
        return started[-1]

    yield start
    for container in started:
        container.process.terminate()
        container.ended()
    shutil.rmtree(directory)


@needs_root
def test_the_entrypoint_ends_with_the_exit_status_of_the_manager(run: Any) -> None:
    assert run("exit 7").ended() == 7


@needs_root
def test_the_entrypoint_ends_with_the_signal_that_ended_the_manager(run: Any) -> None:
    assert run("kill -9 $$").ended() == 137


@needs_root
def test_the_manager_is_not_root_and_reads_its_secrets_from_a_pipe(run: Any) -> None:
    container = run("{ id -u; id -G; } > ids; env > environment; cat <&$ORION_SECRETS_FD > secrets")
    assert container.ended() == 0
    assert container.read("ids").split() == [str(MANAGER)] * 2
    assert json.loads((container.directory / "secrets").read_text()) == {"admin_token": "x"}
    names = {line.partition("=")[0] for line in container.read("environment").splitlines()}
    assert names - {"PWD", "_", "SHLVL", "OLDPWD"} == {
        *("HOME", "LANG", "PATH", "PYTHONUNBUFFERED"),
        *("ORION_HEARTBEAT_S", "ORION_PLAYBOOKS", "ORION_SECRETS_FD"),
        *(name for name in os.environ if name.startswith("ORION_")),
    }


@needs_root
def test_the_engine_has_its_own_uid_and_gets_no_secrets_and_only_its_own_settings(run: Any) -> None:
    tell = "{ id -u; id -G; } > ids; ls /proc/self/fd > open; env > environment; echo > done; exec sleep 600"
    container = run("while [ ! -e done ]; do :; done", tell)
    assert container.ended() == 0
    assert container.read("ids").split() == [str(ENGINE)] * 2
    assert set(container.read("open").split()) <= {"0", "1", "2", "3"}  # 3: of the ls itself
    assert "ORION_HEARTBEAT_S" not in container.read("environment")
    assert "ORION_PLAYBOOKS=/playbooks" in container.read("environment")


@needs_root
def test_an_engine_that_ends_is_started_again_with_a_log_line(run: Any) -> None:
    container = run("while [ ! -e twice ]; do :; done", "[ -e once ] && echo > twice; echo > once; exit 3")
    assert container.ended() == 0
    assert "the engine ended with 3; starting it again" in container.read("log")


@needs_root
def test_processes_that_an_engine_left_are_killed_before_the_next_engine_starts(run: Any) -> None:
    """Let runs leave the engine's session and process group, so that only the uid identifies them."""
    leave = "setsid sh -c 'echo $$ > left; exec sleep 1000' & while [ ! -s left ]; do :; done; kill -9 $$"
    look = "cat /proc/$(cat left)/status > new; echo >> new; mv new again; exit"
    engine = f"if [ -e once ]; then {look}; fi; echo > once; {leave}"
    container = run("while [ ! -e again ]; do :; done", engine)
    assert container.ended() == 0
    status = container.read("again")
    assert status == "\n" or "zombie" in status  # not every process 1 outside of a container reaps at once


@needs_root
def test_the_snapshot_service_stays_root_without_secrets_or_settings_and_is_restarted(run: Any) -> None:
    tell = "{ id -u; id -G; } > ids; ls /proc/self/fd > open; env > environment; echo > once"
    tell = f"if [ -e once ]; then echo > twice; exec sleep 600; fi; {tell}"
    container = run("while [ ! -e twice ]; do :; done", snapshot_service=tell)
    assert container.ended() == 0
    assert container.read("ids").split() == ["0", "0"]
    assert set(container.read("open").split()) <= {"0", "1", "2", "3"}  # 3: of the ls itself
    assert "ORION_HEARTBEAT_S" not in container.read("environment")
    assert "the snapshot service ended with 0; starting it again" in container.read("log")


@needs_root
def test_sigterm_ends_the_manager_first_and_then_the_engine(run: Any) -> None:
    wait = "while :; do sleep 0.02; done"
    manager = f"umask 0; trap 'echo manager >> order; exit 5' TERM; echo > up; {wait}"
    engine = f"umask 0; trap 'echo engine >> order; exit 0' TERM; echo > ready; {wait}"
    container = run(manager, engine)
    for name in ("up", "ready"):
        container.read(name)
    container.process.terminate()
    assert container.ended() == 5
    assert (container.directory / "order").read_text().split() == ["manager", "engine"]


@needs_root
def test_an_engine_that_does_not_end_is_killed(run: Any) -> None:
    deaf = "trap '' TERM; echo > ready; while :; do sleep 0.02; done"
    container = run("while [ ! -e ready ]; do :; done", deaf, grace_s=entrypoint.HELPER_GRACE_S)
    assert container.ended() == 0
