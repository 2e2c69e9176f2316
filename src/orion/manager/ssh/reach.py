"""Whether a worker can be reached by SSH, with its pinned host key and the manager's own key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncssh

from orion.manager.ssh.port import Host, Reached
from orion.ssh_command import host_key_algorithms


class SshReach:
    """The real `port.Reach`, without an SSH agent, a configuration file, other keys, or unknown host keys."""

    def __init__(self, private_key: str) -> None:
        """Take a key in OpenSSH's format. Raise asyncssh.KeyImportError if it is not valid."""
        self._key = asyncssh.import_private_key(private_key)

    async def reach(self, host: Host, timeout_s: float) -> Reached:
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self.connect(host)
        except asyncssh.HostKeyNotVerifiable:
            return Reached.IMPOSTOR
        except asyncssh.KeyExchangeFailed as error:
            # It offers no host key of the pinned type, so it does not have the pinned key.
            return Reached.IMPOSTOR if "host key" in str(error) else Reached.NO
        except (OSError, asyncssh.Error, ValueError):
            return Reached.NO
        connection.abort()
        return Reached.YES

    async def connect(
        self, host: Host, client: Callable[[], asyncssh.SSHClient] = asyncssh.SSHClient
    ) -> asyncssh.SSHClientConnection:
        """Return a connection without keep-alive messages. Raise OSError or asyncssh.Error."""
        more = {"client_keys": [self._key], "client_factory": client, "tcp_keepalive": False}
        return await asyncssh.connect(host.address, host.port, username="root", **more, **pinned(host))


def pinned(host: Host) -> dict[str, Any]:
    """Return the arguments of every connection to a worker: its pinned host keys, and nothing of this machine's own."""
    kinds = dict.fromkeys(key.split()[0] for key in host.host_keys)
    return {
        "known_hosts": ([asyncssh.import_public_key(key) for key in host.host_keys], [], []),
        "preferred_auth": "publickey",
        "disable_trivial_auth": True,
        "agent_path": None,
        "config": None,
        # Algorithms of the pinned keys alone, so that an honest worker shows one of these keys.
        "server_host_key_algs": [name for kind in kinds for name in host_key_algorithms(kind)],
    }
