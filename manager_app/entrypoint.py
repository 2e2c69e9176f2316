"""Start the manager's container, as root: make the secrets, then run the manager, the engine and the snapshot service.

Usage: entrypoint.py MANAGER_COMMAND...

1. Missing secrets are created atomically, in directories that only root may enter.
2. The engine starts under a uid of its own, and can read a copy of the SSH key and nothing else. The snapshot service
   starts as root, because it acts under the uids of rentals; its ssh has a uid of its own and another copy of the key.
   Each is started again whenever it ends.
3. The manager starts under a third uid. It receives its secrets as one JSON object on an inherited pipe, whose number
   is in ORION_SECRETS_FD: never in the environment, in an argument or in a file that it could read again.
4. When the manager ends, the container ends with the manager's exit status. SIGTERM is sent to the manager first, and
   to the others when the manager has ended.

The program needs root's capabilities CHOWN, SETUID, SETGID and KILL, and only the standard library.
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
class Directories:
    """The directories of the container and the accounts that own them. Tests use others."""

    data: Path = Path("/var/lib/orion")
    join: Path = Path("/var/lib/orion-join")
    proxy: Path = Path("/var/lib/orion-proxy")
    run: Path = Path("/run/orion")
    root: Account = Account(0, 0)
    manager: Account = Account(900, 900)
    engine: Account = Account(901, 901)
    files: Account = Account(902, 902)

    @property
    def snapshot_service(self) -> Path:
        return self.run.with_name(f"{self.run.name}-vault")


def main(command: Sequence[str]) -> int:
    os.umask(0o077)
    directories = Directories()
    try:
        manager_secrets = prepare(directories)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        say(f"cannot start: {error}")
        return 1
    return Supervisor(directories, command, helpers(directories), manager_secrets).run()


def prepare(directories: Directories) -> dict[str, str]:
    """Make the directories and the secrets that are missing, and return the secrets of the manager.

    The function may be repeated, and interrupted at any point.
    """
    set_owner(directories.data, directories.root, 0o711)
    private = directories.data / "secrets"
    for directory in (private, directories.join, directories.proxy):
        set_owner(directory, directories.root, 0o700)
    set_owner(directories.data / "database", directories.manager, 0o700)
    key = private / "ssh_key"
    manager_secrets = {
        "admin_token": read_or_create(private / "admin_token", lambda: make_token("admin"), TOKEN),
        "join_token": read_or_create(directories.join / "token", lambda: make_token("join"), TOKEN),
        "proxy_secret": read_or_create(directories.proxy / "secret", make_secret, PROXY_SECRET),
        "ssh_private_key": read_or_create(key, make_ssh_key, PRIVATE_KEY) + "\n",
        "ssh_public_key": read_or_create(key.with_suffix(".pub"), lambda: public_half(key), PUBLIC_KEY),
        "host_authority": read_or_create(private / "ssh_host_authority", make_ssh_key, PRIVATE_KEY) + "\n",
        "user_authority": read_or_create(private / "ssh_user_authority", make_ssh_key, PRIVATE_KEY) + "\n",
    }
    prepare_engine(directories, manager_secrets["ssh_private_key"])
    prepare_snapshot_service(directories, manager_secrets["ssh_private_key"])
    return manager_secrets


def prepare_engine(directories: Directories, private_key: str) -> None:
    """Make the engine's directory with its copy of the key.

    The engine makes its socket itself in the directory above, whose setgid bit gives the socket the manager's group.
    Root takes the directories back before it writes, because it lacks DAC_OVERRIDE.
    """
    set_owner(directories.run, directories.root, 0o700)
    copy_key(directories, directories.run / "engine", directories.engine, private_key)
    set_owner(directories.run, Account(directories.engine.uid, directories.manager.gid), 0o2750)


def prepare_snapshot_service(directories: Directories, private_key: str) -> None:
    """Make the directory of all snapshots, and the service's own directory with its sockets and a copy of the key."""
    set_owner(directories.data / "copies", directories.root, 0o711)
    set_owner(directories.snapshot_service, directories.root, 0o711)
    copy_key(directories, directories.snapshot_service / "ssh", directories.files, private_key)


def copy_key(directories: Directories, directory: Path, account: Account, private_key: str) -> None:
    """Make a directory that belongs to this account, with a copy of the key."""
    set_owner(directory, directories.root, 0o700)
    copy = directory / "id_ed25519"
    write_atomically(copy, private_key)
    set_owner(copy, account, 0o600)
    set_owner(directory, account, 0o700)


def set_owner(path: Path, account: Account, mode: int) -> None:
    """Give a path this owner and mode; make a directory there if nothing exists.

    Root owns the path while its mode changes: changing another account's mode would need FOWNER.
    """
    if not path.exists():
        path.mkdir(parents=True)
    now = path.stat()
    if (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (account.uid, account.gid, mode):
        return
    os.chown(path, os.geteuid(), os.getegid())
    path.chmod(mode)
    os.chown(path, account.uid, account.gid)


def read_or_create(path: Path, make: Callable[[], str], form: re.Pattern[str]) -> str:
    """Return the secret in the file, which is created if it does not exist.

    Raise ValueError if the file does not contain a secret of this form: it is not replaced, because it may be needed.
    """
    if not path.exists():
        write_atomically(path, make() + "\n")
        say(f"made {path}")
    content = path.read_text().strip()
    if not form.fullmatch(content):
        raise ValueError(f"{path} does not contain a valid secret; correct it, or remove it to have a new one made")
    return content


def write_atomically(path: Path, content: str) -> None:
    """Write a file so that after a crash at any instant it has its whole content or does not exist."""
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
    """Return 256 random bits as letters and digits."""
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
    """A child process beside the manager, which is started again whenever it ends."""

    name: str
    command: Sequence[str]
    account: Account
    orphans_uid: int
    """The uid of processes that may survive the helper. Nothing else uses this uid, so all its processes are killed."""
    home: Path
    settings: tuple[str, ...] = ()
    """The environment variables that the helper receives, by name or prefix."""


def helpers(directories: Directories) -> tuple[Helper, ...]:
    engine_paths = ("--socket", str(directories.run / "engine.sock"), "--directory", str(directories.run / "engine"))
    engine = (sys.executable, "-m", "orion.manager.ansible.server", *engine_paths)
    snapshot_paths = ("--copies", str(directories.data / "copies"), "--run", str(directories.snapshot_service))
    snapshots = (sys.executable, "-m", "orion.manager.snapshots.server", *snapshot_paths)
    return (
        Helper(
            "engine",
            engine,
            directories.engine,
            directories.engine.uid,
            directories.run / "engine",
            ("ORION_PLAYBOOKS",),
        ),
        Helper("snapshot service", snapshots, directories.root, directories.files.uid, directories.snapshot_service),
    )


class Supervisor:
    """Run the manager and its helpers, and reap every process of the container that ends, as process 1 must.

    A Popen object exists for each child as long as the child runs: otherwise subprocess would itself wait for the child
    and take its exit status.
    """

    def __init__(
        self,
        directories: Directories,
        manager: Sequence[str],
        helpers: Sequence[Helper],
        manager_secrets: dict[str, str],
    ) -> None:
        self._directories = directories
        self._manager_command = manager
        self._helpers = helpers
        self._manager_secrets = manager_secrets
        self._manager: Child | None = None
        self._stopping = False

    def run(self) -> int:
        """Return the manager's exit status, or 128 plus the signal's number if a signal ended it."""
        signals = _open_wakeup_socket()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        running = [(helper, _start_helper(helper)) for helper in self._helpers]
        manager = self._manager = self._start_manager()
        if self._stopping:
            os.kill(manager.pid, signal.SIGTERM)
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                _wait_for_signal(signals)
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
                    _kill_all_of(helper.orphans_uid)
                    time.sleep(RESTART_PAUSE_S)
                    running[position] = (helper, _start_helper(helper))

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        if self._manager:
            os.kill(self._manager.pid, signal.SIGTERM)

    def _start_manager(self) -> Child:
        reading, writing = os.pipe()
        with os.fdopen(
            writing, "w"
        ) as pipe:  # the pipe's buffer is large enough for the secrets, so this does not block
            json.dump(self._manager_secrets, pipe)
        environment = _clean_environment(("ORION_",)) | {"HOME": "/tmp", "ORION_SECRETS_FD": str(reading)}  # noqa: S108
        try:
            return _start(self._manager_command, self._directories.manager, environment, keep=(reading,))
        finally:
            os.close(reading)


def _start_helper(helper: Helper) -> Child:
    return _start(helper.command, helper.account, _clean_environment(helper.settings) | {"HOME": str(helper.home)})


def _end(children: Sequence[Child]) -> None:
    for child in children:
        child.terminate()
    deadline = time.monotonic() + HELPER_GRACE_S
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _kill_all_of(uid: int) -> None:
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and entry.stat().st_uid == uid:
                os.kill(int(entry.name), signal.SIGKILL)


def _open_wakeup_socket() -> socket.socket:
    """Return a socket that receives a byte for each signal.

    Without it, a signal that arrives just before a blocking wait would be noticed only after that wait.
    """
    receiving, sending = socket.socketpair()
    for end in (receiving, sending):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(sending.detach(), warn_on_full_buffer=False)
    return receiving


def _wait_for_signal(signals: socket.socket) -> None:
    select.select([signals], [], [])
    signals.recv(4096)


def _clean_environment(prefixes: tuple[str, ...]) -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    return passed | {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}


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
