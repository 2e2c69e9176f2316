"""The sockets that listen on this worker's loopback, and the target of a web port among them. Pure.

The renters of one worker share its loopback, so any of them may listen on any free port. Requests for a rental's port
may reach its own processes alone: the kernel says which uid a socket belongs to (web/socket_diag.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

LISTENING = "0A"
_V4 = frozenset(map(ip_address, ("127.0.0.1", "0.0.0.0", "::ffff:127.0.0.1", "::ffff:0.0.0.0")))  # noqa: S104
_V6 = frozenset(map(ip_address, ("::1", "::")))
_BOTH = ip_address("::")
"""The address of sockets that may take IPv4 as well: the kernel's list does not say whether they do."""


@dataclass(frozen=True, kw_only=True)
class Listener:
    """A listening socket."""

    address: IPv4Address | IPv6Address
    port: int
    uid: int
    inode: int


@dataclass(frozen=True)
class PortTarget:
    """The addresses to try in turn, and the inodes of the sockets that may take the connection, all the rental's."""

    addresses: tuple[str, ...]
    inodes: frozenset[int]


def listeners(*tables: str) -> list[Listener]:
    """Return the listening sockets in the texts of /proc/net/tcp and /proc/net/tcp6."""
    found = []
    for table in tables:
        for line in table.splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == LISTENING:
                address, _, port = fields[1].partition(":")
                found.append(
                    Listener(address=_address(address), port=int(port, 16), uid=int(fields[7]), inode=int(fields[9]))
                )
    return found


def target_of(there: Iterable[Listener], uid: int, port: int) -> PortTarget | None:
    """Return the target of a port; None unless each socket that could take a connection to it is this uid's."""
    on_port = [each for each in there if each.port == port]
    v4, v6 = ([each for each in on_port if each.address in version] for version in (_V4, _V6))
    both = [each for each in v6 if each.address == _BOTH]
    may_answer = v4 + both if v4 else v6
    if {each.uid for each in may_answer} != {uid}:
        return None
    addresses = ("127.0.0.1",) * bool(v4 or both) + ("::1",) * (not v4)
    return PortTarget(addresses, frozenset(each.inode for each in may_answer))


def _address(text: str) -> IPv4Address | IPv6Address:
    """Return an address from its hexadecimal text, in which each four bytes are one number in the machine's order."""
    words = [int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)]
    return ip_address(b"".join(words))
