"""Access by common SSH tools, also through takeovers, and the events of sessions."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import asyncssh
import pytest
from conftest import Figures
from renter import COMMAND, Renter, make_key
from stack import MOVED_WITHIN_S, Stack
from support.terminal import at_a_terminal
from waiting import eventually

from orion.client.sdk import Orion
from orion.ssh_client.connect import TIDY
from orion.wire import Rental

BACK_WITHIN_S = MOVED_WITHIN_S


@pytest.fixture
def config(renter: Renter) -> Iterator[str]:
    """Yield ssh's configuration as `orion config-ssh` writes it. (ssh itself uses the home in the list of accounts.)"""
    renter.orion("config-ssh")
    yield str(renter.folder / ".ssh/config")
    renter.orion("config-ssh", "--remove")


@pytest.fixture
def lab(stack: Stack, config: str, renter: Renter) -> Iterator[Rental]:
    assert stack.url == renter.url
    renter.orion("rent", "--name", "lab", "--key", str(renter.key))
    with Orion.at(renter.url, renter.token) as orion:
        yield orion.find_rental("lab")


def test_ssh_scp_sftp_rsync_and_ansible_reach_a_rental_by_its_name(
    lab: Rental, config: str, renter: Renter, tmp_path: Path
) -> None:
    said = renter.run(["ssh", "-F", config, "lab.orion", "id -un"])
    assert (said.stdout, said.stderr) == (f"{lab.username}\n", "")
    content = os.urandom(300_000)
    (tmp_path / "sent").write_bytes(content)
    sent = str(tmp_path / "sent")
    for number, command in enumerate(
        (
            ["scp", "-q", "-F", config, sent, "lab.orion:by-scp"],
            ["rsync", "-e", f"ssh -F {config}", sent, "lab.orion:by-rsync"],
            ["scp", "-q", "-F", config, "lab.orion:by-scp", f"{tmp_path}/back-0"],
            ["rsync", "-e", f"ssh -F {config}", "lab.orion:by-rsync", f"{tmp_path}/back-1"],
            ["sftp", "-q", "-F", config, "-b", "-", "lab.orion:by-scp", f"{tmp_path}/back-2"],
        )
    ):
        done = renter.run(command)
        assert done.returncode == 0, (number, done.stderr)
    for number in range(3):
        assert (tmp_path / f"back-{number}").read_bytes() == content
    ansible = [str(Path(sys.executable).with_name("ansible")), "all", "-i", "lab.orion,", "-m", "ping"]
    pinged = renter.run([*ansible, "--ssh-common-args", f"-F {config}"])
    assert '"ping": "pong"' in pinged.stdout, pinged.stdout + pinged.stderr


def test_ssh_forwards_ports_in_both_directions(lab: Rental, config: str, renter: Renter) -> None:
    assert lab.username
    serve = (
        "import socket; s=socket.create_server(('127.0.0.1', 7777)); print('up', flush=True); s.accept()[0].send(b'in')"
    )
    local = _free_port()
    there = ["ssh", "-F", config, "-L", f"{local}:localhost:7777", "lab.orion", f'python3 -c "{serve}"']
    with subprocess.Popen(there, env=renter.environment, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        assert serving.stdout.readline() == "up\n"
        with socket.create_connection(("127.0.0.1", local), 20) as carried:
            assert carried.recv(10) == b"in"
    with socket.create_server(("127.0.0.1", 0)) as here:
        threading.Thread(target=lambda: here.accept()[0].send(b"out"), daemon=True).start()
        ask = "import socket; print(socket.create_connection(('127.0.0.1', 7778), 20).recv(10).decode())"
        back = f"7778:127.0.0.1:{here.getsockname()[1]}"
        done = renter.run(["ssh", "-F", config, "-R", back, "lab.orion", f'python3 -c "{ask}"'])
    assert done.stdout == "out\n", done.stderr


def test_asyncssh_reads_the_same_configuration(
    lab: Rental, config: str, renter: Renter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncssh reads the included file, runs the ProxyCommand, and trusts only the authority."""
    for name, value in renter.environment.items():
        monkeypatch.setenv(name, value)
    known_hosts = str(renter.folder / ".config/orion/ssh/known_hosts")

    async def ask() -> object:
        async with asyncssh.connect("lab.orion", config=[config], known_hosts=known_hosts) as connection:
            return (await connection.run("id -un", check=True)).stdout

    assert asyncio.run(ask()) == f"{lab.username}\n"


def test_git_and_the_remote_mode_of_an_editor_work(lab: Rental, config: str, renter: Renter, tmp_path: Path) -> None:
    """Push and clone with git by ssh. Act as an editor, which sends a script to a shell without a terminal, requests an
    early answer, and reaches the started server by a SOCKS proxy of the same ssh.
    """
    renter.run(["ssh", "-F", config, "lab.orion", "git init -q --bare there.git"])
    repository = tmp_path / "repository"
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    git = ["git", "-C", str(repository), *identity, "-c", f"core.sshCommand=ssh -F {config}"]
    subprocess.run(["git", "init", "-q", "-b", "main", str(repository)], check=True)
    (repository / "file").write_text("content")
    for command in (["add", "."], ["commit", "-qm", "first"], ["push", "-q", "lab.orion:there.git", "main"]):
        done = renter.run([*git, *command])
        assert done.returncode == 0, done.stderr
    cloned = renter.run([*git, "clone", "-q", "-b", "main", "lab.orion:there.git", str(tmp_path / "clone")])
    assert (cloned.returncode, (tmp_path / "clone/file").read_text()) == (0, "content"), cloned.stderr

    port = _free_port()
    serve = (
        "import socket; s=socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); "
        "s.accept()[0].send(b'in')"
    )
    editor = ["ssh", "-F", config, "-T", "-D", str(port), "-o", "ConnectTimeout=15", "lab.orion", "bash"]
    with subprocess.Popen(
        editor, env=renter.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(f'python3 -c "{serve}"\n')
        session.stdin.flush()
        there = int(session.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), 20) as proxied:
            proxied.sendall(b"\x05\x01\x00")
            assert proxied.recv(2) == b"\x05\x00"
            proxied.sendall(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + there.to_bytes(2, "big"))
            assert proxied.recv(10)[:2] == b"\x05\x00"
            assert proxied.recv(2) == b"in"
        session.stdin.close()


def test_a_second_machine_without_the_key_opens_a_rental_by_a_certificate(
    lab: Rental, renter: Renter, tmp_path: Path
) -> None:
    """Use a second machine with the same token, by `orion ssh` and by plain ssh."""
    second = Renter(tmp_path / "second", renter.url, renter.token)
    assert second.orion("ssh", "lab", "id -un").stdout == f"{lab.username}\n"
    second.orion("config-ssh")
    said = second.run(["ssh", "-F", str(second.folder / ".ssh/config"), "lab.orion", "id -un"])
    assert (said.stdout, said.stderr) == (f"{lab.username}\n", "")


def test_a_shell_reconnects_after_a_restart_of_the_manager(stack: Stack, lab: Rental, renter: Renter) -> None:
    """Check also that a terminal in an editor's mode is reset before a message is printed."""
    with at_a_terminal([*COMMAND, "ssh", "--persist", "lab"], renter.environment) as shell:
        shell.shows("$ ", 30)
        shell.type("MARK=only-in-this-shell\n")
        shell.shows("$ ", 30)
        stack.docker("restart", stack.container("manager_app").id)
        before = shell.shows("is lost; reconnecting", BACK_WITHIN_S)
        assert TIDY in before
        shell.shows("only-in-this-shell", 2 * BACK_WITHIN_S)
        shell.type("clear; echo it is $MARK; exit 5\n")
        shell.shows("it is only-in-this-shell", 30)
        assert shell.ends(30) == 0
    assert lab.name == "lab"


def test_keys_and_certificates_open_a_rental_as_documented(
    lab: Rental, renter: Renter, tmp_path: Path, orion: Orion
) -> None:
    second = make_key(tmp_path / "second")
    renter.orion("keys", "lab", "add", str(second))
    assert renter.ssh(lab, "true", second).returncode == 0
    first = next(key for key in renter.orion_json("keys", "lab", "ls") if key["public_key"] in renter.public_key)
    renter.orion("keys", "lab", "rm", first["fingerprint"], "--yes")
    assert renter.ssh(lab, "true").returncode == 255
    last = renter.orion_json("keys", "lab", "ls")[0]
    assert "only key" in renter.orion("keys", "lab", "rm", last["id"], "--yes", status=6).stderr
    unknown = make_key(tmp_path / "unknown")
    said = renter.orion("ssh", "--cert", "-i", str(unknown), "lab", "echo $(id -un) $ORION_RENTAL")
    assert said.stdout == f"{lab.username} lab\n"
    kinds = [event.kind for event in orion.events(rental_id=lab.id)]
    assert {"rental.key_added", "rental.key_removed", "rental.certificate_issued"} <= set(kinds)


def test_a_session_has_two_events_with_user_address_duration_and_bytes(
    lab: Rental, renter: Renter, orion: Orion
) -> None:
    renter.orion("ssh", "lab", "head -c 100000 /dev/zero")

    def closed() -> list[dict[str, object]]:
        return [e.details for e in orion.events(rental_id=lab.id) if e.kind == "rental.session_closed"]

    eventually("the event of the session's end exists", closed, 60)
    [session] = closed()
    assert int(str(session["bytes_to_client"])) > 100_000
    assert 0 < float(str(session["seconds"])) < 60
    assert re.fullmatch(r"[0-9.]+", str(session["from"]))


def test_a_shell_and_plain_ssh_reconnect_when_their_worker_dies(
    stack: Stack, orion: Orion, lab: Rental, config: str, renter: Renter, figures: Figures
) -> None:
    renter.inside(lab, "echo precious > kept")
    written = datetime.now(UTC)

    def is_copied() -> bool:
        at = orion.rental(lab.id).last_safe_copy_at
        return at is not None and at > written

    eventually("a snapshot has the file", is_copied, 60)
    stack.await_no_brake()
    with at_a_terminal([*COMMAND, "ssh", "lab"], renter.environment) as shell:
        shell.shows("$ ", 30)
        mark, began = stack.mark(), time.monotonic()
        stack.docker("kill", stack.container_of(lab.worker_id).id)
        shell.shows("is lost; reconnecting", BACK_WITHIN_S)
        figures["docker kill to a word of it in the shell"] = f"{time.monotonic() - began:.1f} s"
        shell.shows("is on another worker", BACK_WITHIN_S)
        shell.shows("$ ", BACK_WITHIN_S)
        figures["docker kill to a prompt on another worker"] = f"{time.monotonic() - began:.1f} s"
        shell.type("cat kept; exit 5\n")
        shell.shows("precious", 30)
        assert shell.ends(30) == 5
    stack.await_active(mark, lab, lab.epoch + 1)
    again = renter.run(["ssh", "-F", config, "lab.orion", "cat kept"])
    assert (again.stdout, again.stderr) == ("precious\n", ""), "the same command, without a message"


def test_plain_ssh_waits_for_a_rental_that_is_migrating(stack: Stack, lab: Rental, config: str, renter: Renter) -> None:
    stack.await_kind(0, "rental.copied", 60, rental_id=lab.id)  # a rental without a snapshot would wait for its worker
    stack.await_no_brake()
    machine = renter.run(["ssh", "-F", config, "lab.orion", "hostname"]).stdout
    stack.docker("kill", stack.container_of(lab.worker_id).id)
    done = renter.run(["ssh", "-F", config, "-o", "BatchMode=yes", "lab.orion", "hostname"])
    assert done.returncode == 0, done.stderr
    assert done.stdout != machine
    assert "host key" not in done.stderr.lower()


def test_with_persist_a_broken_connection_restores_the_screen(lab: Rental, renter: Renter) -> None:
    assert lab.name == "lab"
    with breakable_forward(urlsplit(renter.url).port or 80) as way:
        there = {"ORION_URL": f"http://127.0.0.1:{way.port}", "ORION_TOKEN_FILE": str(renter.token_file)}
        with at_a_terminal([*COMMAND, "ssh", "--persist", "lab"], renter.environment | there) as shell:
            shell.shows("$ ", 30)
            shell.type("MARK=only-in-this-shell\n")
            shell.shows("$ ", 30)
            way.cut()
            shell.shows("is lost; reconnecting", BACK_WITHIN_S)
            shell.shows("only-in-this-shell", BACK_WITHIN_S)
            shell.type("clear; echo it is $MARK\n")
            shell.shows("it is only-in-this-shell", 30)
            shell.type("exit\n")
            assert shell.ends(30) == 0


class BreakableForward:
    """Forwards bytes to a port of this machine. It can be cut, and accepts new connections at once."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self._listening.close()
        self.cut()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._open += [here, there]
                for source, target in ((here, there), (there, here)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(65536):
                target.sendall(part)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def breakable_forward(to: int) -> Iterator[BreakableForward]:
    way = BreakableForward(to)
    yield way
    way.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
