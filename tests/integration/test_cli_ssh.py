"""`orion ssh` with the machine's own ssh and sshd, and a WebSocket server in place of the platform."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.own_sshd import OwnSshd, needs_sshd
from support.scripted_platform import HOST_KEY, Answer, ScriptedPlatform, problem, rental
from support.terminal import at_a_terminal
from websockets.asyncio.server import ServerConnection, serve

from orion.cli.shell import SshRequest, ssh_arguments
from orion.errors import UnreadableReply
from orion.ssh_client import hosts
from orion.wire import Rental

AUTHORITY = f"@cert-authority *.orion {HOST_KEY}"


def arguments(identity: Path | None = None, *command: str, authority: str = AUTHORITY, **changes: Any) -> list[str]:
    return ssh_arguments(
        Rental.model_validate(rental(**changes)), authority, SshRequest(command=command, identity=identity)
    )


def test_ssh_verifies_the_worker_by_the_rentals_id() -> None:
    built = arguments()
    assert "StrictHostKeyChecking=yes" in built
    assert "HostKeyAlias=abcdefgh23.orion" in built
    assert f"KnownHostsCommand=/bin/echo @cert-authority *.orion {HOST_KEY}" in built


def test_the_command_comes_after_the_host_and_is_never_an_option_of_ssh() -> None:
    built = arguments(None, "-oProxyCommand=x", "ls")
    assert built[-4:] == ["--", "r-abcdefgh23@box.orion", "-oProxyCommand=x", "ls"]


def test_ssh_offers_only_the_known_key(tmp_path: Path) -> None:
    built = arguments(tmp_path / "key")
    assert f'IdentityFile="{tmp_path / "key"}"' in built
    assert "IdentitiesOnly=yes" in built


@pytest.mark.parametrize("odd", ["it's", 'a "b"', "a b", "100%h", "$HOME", "a\\b", "#1", "ärger"])
def test_ssh_reads_the_given_path_of_a_key_or_certificate_literally(tmp_path: Path, odd: str) -> None:
    key, certificate = tmp_path / odd / "key", tmp_path / odd / "key-cert.pub"
    found = Rental.model_validate(rental())
    ssh, *options = ssh_arguments(found, AUTHORITY, SshRequest(command=(), identity=key), certificate)
    done = subprocess.run([ssh, "-F", "none", "-G", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = done.stdout.replace("%%", "%").splitlines()
    assert f"identityfile {key}" in options
    assert f"certificatefile {certificate}" in options


def test_an_agent_is_forwarded_only_on_request() -> None:
    found = Rental.model_validate(rental())
    assert "ForwardAgent=no" in ssh_arguments(found, AUTHORITY, SshRequest())
    assert "ForwardAgent=yes" in ssh_arguments(found, AUTHORITY, SshRequest(forward_agent=True))


@pytest.mark.parametrize(
    "change",
    [
        {"username": "-oProxyCommand=x"},
        {"username": "root"},
        {"id": "x y"},
        {"id": "x;reboot"},
        {"name": "-oProxyCommand=x"},
        {"authority": ""},
        {"authority": f"@cert-authority * {HOST_KEY}"},
        {"authority": f"*.orion {HOST_KEY}"},
        {"authority": "@cert-authority *.orion ssh-ed25519 $(reboot)"},
        {"authority": f"{AUTHORITY}\n* {HOST_KEY}"},
    ],
)
def test_no_text_from_the_server_becomes_an_option_of_ssh(change: dict[str, Any]) -> None:
    with pytest.raises(UnreadableReply):
        arguments(None, **change)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a machine that has a PATH, but no agent and no configuration of a user."""
    (tmp_path / "token").write_text("orion_client_t1_secret")
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "ORION_TOKEN_FILE": str(tmp_path / "token"),
    }


def orion_ssh(platform: ScriptedPlatform, environment: dict[str, str], *given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "orion.cli", "ssh", *given]
    where = {**environment, "ORION_URL": platform.url}
    return subprocess.run(command, env=where, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def recording_ssh(environment: dict[str, str], tmp_path: Path) -> Path:
    """Put a program in place of ssh that prints its arguments and exits with 42, and return its path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "ssh"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(42)\n")
    program.chmod(0o755)
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    return program


CERTIFICATE = "ssh-ed25519-cert-v01@openssh.com AAAAIHNzaC1lZDI1NTE5"


@pytest.fixture
def a_rental_that_comes() -> Iterator[ScriptedPlatform]:
    """Yield a platform whose rental is migrating at the first request and active afterwards."""
    platform = ScriptedPlatform()
    platform.answer("GET", "/api/rentals/box", rental(state="migrating"))
    platform.answer("GET", "/api/rentals/abcdefgh23", rental(worker_id="w-bbbb3333"))
    platform.answer("GET", "/api/ssh-authority", {"public_key": HOST_KEY, "known_hosts": AUTHORITY})
    signed = {"certificate": CERTIFICATE, "expires_at": "2130-01-01T00:00:00Z"}
    platform.answer("POST", "/api/rentals/abcdefgh23/certificate", signed)
    yield platform
    platform.stop()


def has_recorded_key(environment: dict[str, str]) -> Path:
    key = Path(environment["HOME"]) / "recorded"
    key.touch(mode=0o600)
    place = Path(environment["HOME"]) / ".config/orion"
    place.mkdir(parents=True)
    (place / "keys.json").write_text(json.dumps({"abcdefgh23": str(key)}))
    return key


@pytest.mark.usefixtures("recording_ssh")
def test_the_command_becomes_ssh_and_has_its_exit_status(
    environment: dict[str, str], a_rental_that_comes: ScriptedPlatform
) -> None:
    key = has_recorded_key(environment)
    done = orion_ssh(a_rental_that_comes, environment, "box", "--", "ls", "-l", "--json")
    assert done.returncode == 42, done.stderr
    given = json.loads(done.stdout)
    assert given[-4:] == ["r-abcdefgh23@box.orion", "ls", "-l", "--json"]
    assert "HostKeyAlias=abcdefgh23.orion" in given
    assert f'IdentityFile="{key}"' in given
    assert not [option for option in given if option.startswith("CertificateFile")]


def test_an_ssh_that_is_too_old_is_refused_before_it_runs(
    environment: dict[str, str], recording_ssh: Path, a_rental_that_comes: ScriptedPlatform
) -> None:
    recording_ssh.write_text("#!/bin/sh\necho OpenSSH_8.4p1 Debian-5, OpenSSL 1.1.1w >&2\n")
    done = orion_ssh(a_rental_that_comes, environment, "box")
    assert done.returncode == 1
    assert done.stderr.replace("\n", " ").strip() == (
        "orion: orion ssh needs OpenSSH 8.5 or newer, and this machine has 8.4. Run orion config-ssh once, then ssh "
        "NAME.orion"
    )


@pytest.mark.usefixtures("recording_ssh")
@pytest.mark.parametrize("why", ["rented elsewhere", "its key is gone", "asked for"])
def test_a_certificate_opens_a_rental_without_a_key_on_this_machine(
    environment: dict[str, str], a_rental_that_comes: ScriptedPlatform, why: str
) -> None:
    if why != "rented elsewhere":
        key = has_recorded_key(environment)
        if why == "its key is gone":
            key.unlink()
    done = orion_ssh(a_rental_that_comes, environment, *(["--cert"] if why == "asked for" else []), "box")
    assert done.returncode == 42, done.stderr
    given = json.loads(done.stdout)
    own = Path(environment["HOME"]) / ".config/orion"
    assert f'IdentityFile="{own / "id_ed25519"}"' in given
    assert f'CertificateFile="{own / "abcdefgh23-cert.pub"}"' in given
    assert (own / "abcdefgh23-cert.pub").read_text().startswith(CERTIFICATE)
    asked = next(call for call in a_rental_that_comes.calls if call.method == "POST")
    assert asked.body["ssh_public_key"] == " ".join((own / "id_ed25519.pub").read_text().split()[:2])


@pytest.mark.usefixtures("recording_ssh")
def test_ssh_waits_for_a_manager_that_restarts(
    environment: dict[str, str], a_rental_that_comes: ScriptedPlatform
) -> None:
    has_recorded_key(environment)
    away = problem(502, "manager_unreachable", "no manager: try again", {"X-Orion-Manager": "unreachable"})
    there = {"public_key": HOST_KEY, "known_hosts": AUTHORITY}
    a_rental_that_comes.answer("GET", "/api/rentals/box", away, rental())
    a_rental_that_comes.answer("GET", "/api/ssh-authority", away, Answer(body=there))
    assert orion_ssh(a_rental_that_comes, environment, "box", "true").returncode == 42


@pytest.mark.parametrize("shell", ["/usr/sbin/nologin", "/bin/false", "/nowhere/zsh"])
def test_ssh_gets_a_shell_that_can_start_its_proxy_command(
    environment: dict[str, str], recording_ssh: Path, a_rental_that_comes: ScriptedPlatform, shell: str
) -> None:
    has_recorded_key(environment)
    recording_ssh.write_text('#!/bin/sh\necho "$SHELL"\n')
    done = orion_ssh(a_rental_that_comes, environment | {"SHELL": shell}, "box", "true")
    assert (done.stdout, done.returncode) == ("/bin/sh\n", 0), done.stderr


@needs_sshd
@pytest.mark.parametrize("named", ["its own rental", "another rental", "nobody, without a certificate"])
async def test_ssh_talks_only_to_a_worker_that_proves_the_rental_s_identity(
    environment: dict[str, str], tmp_path: Path, named: str
) -> None:
    of_rentals = {"its own rental": ("abcdefgh23",), "another rental": ("another234",)}.get(named, ())
    worker = OwnSshd.make(tmp_path, of_rentals)
    found = Rental.model_validate(rental())
    async with at_the_platform(worker.serve) as url:
        ssh, *options = ssh_arguments(found, worker.authority, SshRequest(command=("true",)))
        process = await asyncio.create_subprocess_exec(
            *(ssh, "-F", "none", "-o", "BatchMode=yes", *options),
            env={**environment, "ORION_URL": url}, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        _out, said = await asyncio.wait_for(process.communicate(), 60)
    # This machine does not have the rental's user. If ssh is refused as a user, it has accepted the host.
    expected = b"Permission denied" if named == "its own rental" else b"Host key verification failed"
    assert expected in said, said.decode()
    assert process.returncode == 255


@contextmanager
def agent_with_keys(folder: Path, number: int) -> Iterator[dict[str, str]]:
    """Start a real agent with this many keys that open nothing, and yield the environment of its clients."""
    where = {"SSH_AUTH_SOCK": str(folder / "agent")}
    with subprocess.Popen(["ssh-agent", "-D", "-a", where["SSH_AUTH_SOCK"]], stdout=subprocess.DEVNULL) as agent:
        try:
            give_up_at = time.monotonic() + 60
            # The agent's socket exists before the agent listens; ssh-add exits with 2 if no agent answers.
            its = {**os.environ, **where}
            while subprocess.run(["ssh-add", "-l"], env=its, capture_output=True, check=False).returncode == 2:
                assert time.monotonic() < give_up_at, "the agent does not start"
                time.sleep(0.01)
            for each in range(number):
                key = folder / f"other{each}"
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
                subprocess.run(["ssh-add", "-q", key], env=its, check=True)
                key.unlink()
            yield where
        finally:
            agent.terminate()


@needs_sshd
@pytest.mark.parametrize("changed", [[], ["-o", "IdentitiesOnly=no"]], ids=["as written", "without IdentitiesOnly"])
async def test_the_configuration_logs_in_with_a_key_file_despite_other_keys_in_an_agent(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: list[str]
) -> None:
    """sshd accepts six attempts (MaxAuthTries), and ssh offers an agent's keys before a key that is only in a file."""
    worker, place = OwnSshd.make(tmp_path, ("abcdefgh23",)), tmp_path / "config"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place))
    (place / "orion").mkdir(parents=True)
    (place / "orion/keys.json").write_text(json.dumps({"abcdefgh23": str(worker.key)}))
    hosts.write([rental()], [], worker.authority)
    # This machine does not have the rental's user, so the user of the test logs in as itself.
    command = ["ssh", "-F", str(hosts.folder() / "config"), "-l", worker.account, "-o", "BatchMode=yes"]
    with agent_with_keys(tmp_path, 7) as where:
        async with at_the_platform(worker.serve) as url:
            process = await asyncio.create_subprocess_exec(
                *command, *changed, "box.orion", "echo is in",
                env={**environment, **where, "ORION_URL": url},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            out, said = await asyncio.wait_for(process.communicate(), 60)
    if changed:
        assert b"Too many authentication failures" in said, said.decode()
    else:
        assert (out, process.returncode) == (b"is in\n", 0), said.decode()


EDITOR = "printf '\\033[?1049h\\033[?25l\\033[2J\\033[5;7Ha full screen'; exec cat"
"""A command that sets up the terminal as an editor does, then waits."""
ENDS = {
    "its rental leaves the worker": "the rental is not on that worker any more: its worker is down",
    "the manager is gone": "the connection to the platform was cut",
}

WORDS_OF_SSH = ("Connection to box.orion closed", "client_loop: send disconnect: Broken pipe")
"""The beginnings of ssh's own lines. ssh complains about a pipe if it needs over a second to see the relay's end."""


@needs_sshd
@pytest.mark.parametrize("how", ENDS)
async def test_a_lost_full_screen_session_leaves_the_terminal_in_order(
    environment: dict[str, str], tmp_path: Path, how: str
) -> None:
    """ssh owns the terminal until it ends, and prints a line of its own."""
    worker, lost = OwnSshd.make(tmp_path, ("abcdefgh23",)), asyncio.Event()

    async def serve_until_lost(connection: ServerConnection) -> None:
        serving = asyncio.create_task(worker.serve(connection))
        await lost.wait()
        if how == "the manager is gone":
            connection.transport.abort()
        else:
            await connection.close(4001, "its worker is down")
        await asyncio.gather(serving, return_exceptions=True)

    request = SshRequest(command=(EDITOR,), identity=worker.key, tty=True)
    ssh, *options = ssh_arguments(Rental.model_validate(rental()), worker.authority, request)
    options[options.index("r-abcdefgh23@box.orion")] = f"{worker.account}@box.orion"
    async with at_the_platform(serve_until_lost) as url:
        with at_a_terminal([ssh, "-F", "none", *options], {**environment, "ORION_URL": url}) as terminal:
            await asyncio.to_thread(terminal.shows, "a full screen", 60)
            lost.set()
            assert await asyncio.to_thread(terminal.ends, 60) == 255
            left, modes = terminal.rest().decode(), termios.tcgetattr(terminal.screen)
    before, _, after = left.partition("orion: ")
    assert "\x1b[?1049l" in before, "the alternate screen is left before the first message"
    assert "\x1b[!p" in before, "a soft reset shows the cursor again"
    assert not re.search(r"(?<!\r)\n", after), "each line begins at the left"
    first, *of_ssh = [line.strip("\r") for line in after.removesuffix("\n").split("\n")]
    assert first == ENDS[how]
    assert of_ssh, "ssh reports its end"
    assert all(line.startswith(WORDS_OF_SSH) for line in of_ssh), of_ssh
    assert modes[1] & termios.OPOST
    assert modes[3] & termios.ICANON


@asynccontextmanager
async def at_the_platform(relay: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[str]:
    """Yield the address of a WebSocket server in the place of the platform."""
    async with serve(relay, "127.0.0.1", 0, compression=None, close_timeout=0.2) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
