"""How the manager's processes connect to a worker by OpenSSH: its pinned host key, their own key, nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from orion.manager.ssh.port import Host
from orion.ssh_command import option_arguments, pinned_host_arguments, ssh_command

CONNECT_TIMEOUT_S = 5
SSH_OPTIONS = (
    f"ConnectTimeout={CONNECT_TIMEOUT_S}",
    # A worker that stops while its connection is open is found within 6 s.
    "ServerAliveInterval=2",
    "ServerAliveCountMax=2",
    "ForwardAgent=no",
    "ForwardX11=no",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
    "PreferredAuthentications=publickey",
    "BatchMode=yes",
)
NO_CONFIGURATION = ("-F", "none")
MAX_MESSAGE = 500
IMPOSTOR = "it has another host key than the pinned one"
_IMPOSTOR_SIGNS = (
    "REMOTE HOST IDENTIFICATION HAS CHANGED",
    "Host key verification failed",
    "no matching host key type found",
    "host key is incorrect",
)
_PREFACE = re.compile(
    r"Task failed: |Failed to connect to the host via ssh: "
    r"|Data could not be sent to remote host \S+ Make sure this host can be reached over ssh: "
)


def options(host: Host) -> list[str]:
    """Return the arguments of ssh that any connection to this worker has."""
    pinned = pinned_host_arguments(host.worker_id, host.host_keys)
    return [*pinned, *option_arguments(SSH_OPTIONS), *NO_CONFIGURATION]


def worker_ssh(host: Host, directory: Path, more: Sequence[str]) -> list[str]:
    """Return the argument list of an ssh to a worker, as root. `directory`: of the key, and of control sockets.

    `more`: options that count before SSH_OPTIONS.
    """
    own = (*more, f"ControlPath={control_path(host, directory)}", *SSH_OPTIONS)
    flags = (*NO_CONFIGURATION, "-T", "-i", str(directory / "id_ed25519"), "-p", str(host.port), "-l", "root")
    return ssh_command(host.address, pinned_host_arguments(host.worker_id, host.host_keys), own, flags)


def control_path(host: Host, directory: Path) -> Path:
    """Return the path of the control socket, which differs by worker, address and host keys."""
    recognised = "\n".join((host.address, str(host.port), *host.host_keys))
    return directory / f"{host.worker_id}-{sha256(recognised.encode()).hexdigest()[:12]}"


def explained(complaint: str) -> str:
    """Return why there is no connection, for a person; empty if ssh did not say."""
    if any(sign in complaint for sign in _IMPOSTOR_SIGNS):
        return IMPOSTOR
    return one_line(_PREFACE.sub("", complaint))


def one_line(message: str) -> str:
    """Return `plain` text of MAX_MESSAGE characters or fewer."""
    line = plain(message)
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 3]}..."


def plain(text: str) -> str:
    """Return one line without control characters: a worker may have written it, and a person reads it."""
    return re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]+", " ", text).strip()
