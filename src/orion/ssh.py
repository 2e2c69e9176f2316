"""OpenSSH's arguments for a connection whose host key is pinned, shared by Ansible's inventory and `orion ssh`."""

from __future__ import annotations

from collections.abc import Sequence


def pinned_host_arguments(alias: str, host_keys: Sequence[str]) -> list[str]:
    """The options that accept these host keys under this alias, and no other key or file.

    `host_keys` are lines as in a .pub file: type, key. No file is needed: OpenSSH (8.5 or newer) asks
    KnownHostsCommand, see ssh_config(5). The values hold no character that a shell or ssh would interpret:
    an alias is one of our ids, a key is base-64.
    """
    if not host_keys:
        raise ValueError(f"no host key is known for {alias}")
    key = min(host_keys, key=lambda line: (not line.startswith("ssh-ed25519 "), line))
    key_type, encoded = key.split()[:2]
    return [
        "-o", "StrictHostKeyChecking=yes",
        "-o", f"HostKeyAlias={alias}",
        "-o", f"HostKeyAlgorithms={_algorithms(key_type)}",
        "-o", f"KnownHostsCommand=/bin/echo {alias} {key_type} {encoded}",
        "-o", "UserKnownHostsFile=none",
        "-o", "GlobalKnownHostsFile=none",
        "-o", "UpdateHostKeys=no",
    ]  # fmt: skip


def _algorithms(key_type: str) -> str:
    return "rsa-sha2-512,rsa-sha2-256" if key_type == "ssh-rsa" else key_type
