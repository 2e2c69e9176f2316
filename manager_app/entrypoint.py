"""What the manager's container starts with, as root: secrets, then the manager, the engine and the vault.

Usage: entrypoint.py MANAGER_COMMAND...

1. Secrets that are missing are made, each whole or not at all, in directories that root alone may enter.
2. The engine starts under a uid of its own, with a copy of the SSH key and nothing else to read. The vault starts as
   root, to act under the uids of rentals; its ssh has a uid of its own, with another copy of the key. Each is started
   again whenever it ends.
3. The manager starts under yet another uid. Its secrets reach it as one JSON object on an inherited pipe, whose number
   is in ORION_SECRETS_FD: never in the environment, in an argument or in a file that it could read again.
4. When the manager ends, so does all, with the manager's status. SIGTERM goes to the manager first, then to the
   others.

Of root's capabilities it needs CHOWN, SETUID, SETGID and KILL. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import signal
import socket
import stat
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

TOKEN = re.compile(r"orion_(admin|join)_[a-z0-9-]+_[A-Za-z0-9]{43}")
PROXY_SECRET = re.compile(r"[A-Za-z0-9]{43,}")
PRIVATE_KEY = re.compile(r"-----BEGIN .* PRIVATE KEY-----\n.*", re.DOTALL)
PUBLIC_KEY = re.compile(r"ssh-.*")
SECRET_LENGTH = 43
RESTART_PAUSE_S = 0.5
HELPER_GRACE_S = 3.0

Child = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Account:
    uid: int
    gid: int


@dataclass(frozen=True)
class Places:
    """Where everything is, and whose. Tests move it."""

    data: Path = Path("/var/lib/orion")
    join: Path = Path("/var/lib/orion-join")
    proxy: Path = Path("/var/lib/orion-proxy")
    run: Path = Path("/run/orion")
    root: Account = Account(0, 0)
    manager: Account = Account(900, 900)
    engine: Account = Account(901, 901)
    files: Account = Account(902, 902)

    @property
    def vault(self) -> Path:
        return self.run.with_name(f"{self.run.name}-vault")


def main(command: Sequence[str]) -> int:
    os.umask(0o077)
    places = Places()
    try:
        held = prepare(places)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        say(f"cannot start: {error}")
        return 1
    return Supervisor(places, command, helpers(places), held).run()


def prepare(places: Places) -> dict[str, str]:
    """Directories and secrets as they must be; returns what the manager may know. Safe to repeat and to interrupt."""
    own(places.data, places.root, 0o711)
    private = places.data / "secrets"
    for directory in (private, places.join, places.proxy):
        own(directory, places.root, 0o700)
    own(places.data / "database", places.manager, 0o700)
    key = private / "ssh_key"
    held = {
        "admin_token": kept(private / "admin_token", lambda: make_token("admin"), TOKEN),
        "join_token": kept(places.join / "token", lambda: make_token("join"), TOKEN),
        "proxy_secret": kept(places.proxy / "secret", make_secret, PROXY_SECRET),
        "ssh_private_key": kept(key, make_ssh_key, PRIVATE_KEY) + "\n",
        "ssh_public_key": kept(key.with_suffix(".pub"), lambda: public_half(key), PUBLIC_KEY),
        "host_authority": kept(private / "ssh_host_authority", make_ssh_key, PRIVATE_KEY) + "\n",
        "user_authority": kept(private / "ssh_user_authority", make_ssh_key, PRIVATE_KEY) + "\n",
    }
    prepare_engine(places, held["ssh_private_key"])
    prepare_vault(places, held["ssh_private_key"])
    return held


def prepare_engine(places: Places, private_key: str) -> None:
    """The engine's directory with its copy of the key. Its socket is made by itself in the directory above, whose
    setgid bit gives it the manager's group.

    What was the engine's is taken back first: root without DAC_OVERRIDE could not write into it.
    """
    own(places.run, places.root, 0o700)
    give_key(places, places.run / "engine", places.engine, private_key)
    own(places.run, Account(places.engine.uid, places.manager.gid), 0o2750)


def prepare_vault(places: Places, private_key: str) -> None:
    """Where copies are, each rental's in a directory of the rental's own uid; and the vault's sockets and key."""
    own(places.data / "copies", places.root, 0o711)
    own(places.vault, places.root, 0o711)
    give_key(places, places.vault / "ssh", places.files, private_key)


def give_key(places: Places, directory: Path, account: Account, private_key: str) -> None:
    """A directory of this account's, with a copy of the key."""
    own(directory, places.root, 0o700)
    copy = directory / "id_ed25519"
    write_whole(copy, private_key)
    own(copy, account, 0o600)
    own(directory, account, 0o700)


def own(path: Path, account: Account, mode: int) -> None:
    """Make a directory that is missing; give an existing path this owner and mode.

    It is root's while its mode changes: changing it for somebody else would need FOWNER.
    """
    if not path.exists():
        path.mkdir(parents=True)
    now = path.stat()
    if (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (account.uid, account.gid, mode):
        return
    os.chown(path, os.geteuid(), os.getegid())
    path.chmod(mode)
    os.chown(path, account.uid, account.gid)


def kept(path: Path, make: Callable[[], str], form: re.Pattern[str]) -> str:
    """The secret in the file, made at first. A file that holds something else is not replaced: it may be precious."""
    if not path.exists():
        write_whole(path, make() + "\n")
        say(f"made {path}")
    content = path.read_text().strip()
    if not form.fullmatch(content):
        raise ValueError(f"{path} does not hold what it should; put it right, or remove it to have a new one made")
    return content


def write_whole(path: Path, content: str) -> None:
    """After a crash at any instant the file is there with its whole content, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    partial.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)


def make_secret() -> str:
    """256 bits, in letters and figures."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(SECRET_LENGTH))


def make_token(role: str) -> str:
    return f"orion_{role}_{role}_{make_secret()}"


def make_ssh_key() -> str:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "orion-manager", "-f", file], check=True)
        return file.read_text().strip()


def public_half(private_key: Path) -> str:
    command = ["ssh-keygen", "-y", "-f", private_key]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@dataclass(frozen=True)
class Helper:
    """A child beside the manager that is started again whenever it ends."""

    name: str
    command: Sequence[str]
    account: Account
    leaves: int
    """The uid of what it may leave running, which nobody would end any more: the uid is used for that alone."""
    home: Path
    settings: tuple[str, ...] = ()
    """Of the environment."""


def helpers(places: Places) -> tuple[Helper, ...]:
    where = ("--socket", str(places.run / "engine.sock"), "--directory", str(places.run / "engine"))
    engine = (sys.executable, "-m", "orion.manager.engine.server", *where)
    stores = ("--copies", str(places.data / "copies"), "--run", str(places.vault))
    vault = (sys.executable, "-m", "orion.manager.engine.vault", *stores)
    engine_settings = ("ORION_PLAYBOOKS",)
    return (
        Helper("engine", engine, places.engine, places.engine.uid, places.run / "engine", engine_settings),
        Helper("vault", vault, places.root, places.files.uid, places.vault),
    )


class Supervisor:
    """The children, and every orphan of the container: it may be process 1, so it reaps whatever ends.

    The children are kept as objects for as long as they run: one that is forgotten would ask for its status itself.
    """

    def __init__(self, places: Places, manager: Sequence[str], helpers: Sequence[Helper], held: dict[str, str]) -> None:
        self._places = places
        self._manager_command = manager
        self._helpers = helpers
        self._held = held
        self._manager: Child | None = None
        self._stopping = False

    def run(self) -> int:
        """Returns the manager's status, 128 and the signal's number where a signal ended it."""
        awoken = _wake_up_fd()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        running = [(helper, _start_helper(helper)) for helper in self._helpers]
        manager = self._manager = self._start_manager()
        if self._stopping:
            os.kill(manager.pid, signal.SIGTERM)
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                _wait_for_a_signal(awoken)
                continue
            code = os.waitstatus_to_exitcode(status)
            if pid == manager.pid:
                self._manager = None
                manager.returncode = code
                _end([child for _, child in running])
                return code if code >= 0 else 128 - code
            for position, (helper, child) in enumerate(running):
                if pid == child.pid:
                    child.returncode = code
                    say(f"the {helper.name} ended with {code}; starting it again")
                    _kill_all_of(helper.leaves)
                    time.sleep(RESTART_PAUSE_S)
                    running[position] = (helper, _start_helper(helper))

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        if self._manager:
            os.kill(self._manager.pid, signal.SIGTERM)

    def _start_manager(self) -> Child:
        reading, writing = os.pipe()
        with os.fdopen(writing, "w") as pipe:  # it holds more than the secrets need, so nobody has to read yet
            json.dump(self._held, pipe)
        environment = _clean_environment(("ORION_",)) | {"HOME": "/tmp", "ORION_SECRETS_FD": str(reading)}  # noqa: S108
        try:
            return _start(self._manager_command, self._places.manager, environment, keep=(reading,))
        finally:
            os.close(reading)


def _start_helper(helper: Helper) -> Child:
    return _start(helper.command, helper.account, _clean_environment(helper.settings) | {"HOME": str(helper.home)})


def _end(children: Sequence[Child]) -> None:
    for child in children:
        child.terminate()
    last_moment = time.monotonic() + HELPER_GRACE_S
    for child in children:
        try:
            child.wait(max(0.0, last_moment - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _kill_all_of(uid: int) -> None:
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and entry.stat().st_uid == uid:
                os.kill(int(entry.name), signal.SIGKILL)


def _wake_up_fd() -> socket.socket:
    """Reads a byte for each signal: one that comes just before a wait that blocks would else be seen after it."""
    awoken, wake = socket.socketpair()
    for end in (awoken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.detach(), warn_on_full_buffer=False)
    return awoken


def _wait_for_a_signal(awoken: socket.socket) -> None:
    select.select([awoken], [], [])
    awoken.recv(4096)


def _clean_environment(prefixes: tuple[str, ...]) -> dict[str, str]:
    kept_ones = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    return kept_ones | {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}


def _start(command: Sequence[str], account: Account, environment: dict[str, str], keep: tuple[int, ...] = ()) -> Child:
    return subprocess.Popen(
        command,
        env=environment,
        pass_fds=keep,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        user=account.uid,
        group=account.gid,
        extra_groups=[],
        umask=0o077,
    )


def say(line: str) -> None:
    sys.stderr.write(f"entrypoint: {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
