"""The arguments of OpenSSH for hosts whose keys are pinned, for the manager, Ansible's inventory and `orion ssh`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NewType

Pinned = NewType("Pinned", list[str])  # the ssh arguments that pin one host. Only the functions below make them


def ssh_command(
    destination: str,
    pinned: Pinned,
    options: Iterable[str] = (),
    flags: Sequence[str] = (),
    command: Sequence[str] = (),
) -> list[str]:
    """Return the argument list of an ssh to a pinned host. `options` are the values of -o.

    ssh takes the first value of an option that is given twice, so no option can turn off the check of the host key.
    """
    return ["ssh", *pinned, *option_arguments(options), *flags, "--", destination, *command]


def option_arguments(options: Iterable[str]) -> list[str]:
    """Return these options of ssh_config as arguments."""
    return [argument for option in options for argument in ("-o", option)]


def pinned_host_arguments(alias: str, host_keys: Sequence[str]) -> Pinned:
    """Return the options that accept these host keys (lines of a .pub file) under this alias, and no other key or file.

    No shell and no ssh interprets a character of the values: an alias is an id of the platform, a key is base-64.
    """
    if not host_keys:
        raise ValueError(f"no host key is known for {alias}")
    key = min(host_keys, key=lambda line: (not line.startswith("ssh-ed25519 "), line))
    key_type, encoded = key.split()[:2]
    algorithms = ",".join(host_key_algorithms(key_type))
    return _pinned(alias, f"{alias} {key_type} {encoded}", f"HostKeyAlgorithms={algorithms}")


def pinned_authority_arguments(alias: str, authority: str) -> Pinned:
    """Return the options that accept a host which this checked known_hosts line certifies under this alias alone."""
    return _pinned(alias, authority)


def host_key_algorithms(key_type: str) -> tuple[str, ...]:
    """Return the names of the signatures by which a host shows a key of this type."""
    return ("rsa-sha2-512", "rsa-sha2-256") if key_type == "ssh-rsa" else (key_type,)


def _pinned(alias: str, known_host: str, *more: str) -> Pinned:
    """Return the options without a file of known hosts: OpenSSH 8.5 and newer runs KnownHostsCommand, ssh_config(5)."""
    options = (
        "StrictHostKeyChecking=yes",
        f"HostKeyAlias={alias}",
        *more,
        f"KnownHostsCommand=/bin/echo {known_host}",
        "UserKnownHostsFile=none",
        "GlobalKnownHostsFile=none",
        "UpdateHostKeys=no",
    )
    return Pinned(option_arguments(options))
