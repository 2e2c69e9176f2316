"""The sshd of this machine in place of a worker's: behind a WebSocket, for the user that runs the tests."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.builders import AUTHORITIES
from websockets.asyncio.server import ServerConnection

from orion.manager.ssh.authority import Authority

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
CAN_RUN_SSHD = SSHD is not None and (os.geteuid() != 0 or Path("/run/sshd").is_dir())
needs_sshd = pytest.mark.skipif(
    not CAN_RUN_SSHD, reason="needs sshd (openssh-server), and /run/sshd when run as root: then it runs"
)


@dataclass(frozen=True)
class OwnSshd:
    """One sshd for each connection, as inetd starts it, with a host key and a certificate of it."""

    host_key: Path
    authority: str
    """The line of known_hosts of this host."""
    key: Path
    """The file of the private key for the account."""
    account: str
    """The user that runs the tests: an sshd that is not root's accepts no other user."""

    @staticmethod
    def make(folder: Path, rental_ids: tuple[str, ...]) -> OwnSshd:
        """Return an sshd with a certificate for these rentals; without rentals it has none."""
        for name in ("host", "renter"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        authority = Authority(*AUTHORITIES, time.time)
        public = " ".join((folder / "host.pub").read_text().split()[:2])
        line = authority.host_certificate(1, "w-aaaa2222", [public], rental_ids).line if rental_ids else ""
        (folder / "host-cert.pub").write_text(f"{line}\n" if line else "")
        known = f"@cert-authority *.orion {authority.of_hosts}"
        return OwnSshd(folder / "host", known, folder / "renter", pwd.getpwuid(os.geteuid()).pw_name)

    @property
    def public_host_key(self) -> str:
        """Return the host key's kind and base 64."""
        return " ".join(self.host_key.with_suffix(".pub").read_text().split()[:2])

    async def serve(self, connection: ServerConnection) -> None:
        """Relay one connection until either side ends it."""
        options = {
            "HostCertificate": f"{self.host_key}-cert.pub",
            "UsePAM": "no",
            "StrictModes": "no",
            "AuthorizedKeysFile": f"{self.key}.pub",
        }
        set_ = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        ours, its = socket.socketpair()
        process = await asyncio.create_subprocess_exec(
            *(str(SSHD), "-i", "-e", "-f", "/dev/null", "-h", str(self.host_key), *set_),
            stdin=its, stdout=its, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        its.close()
        reader, writer = await asyncio.open_connection(sock=ours)

        async def down() -> None:
            while data := await reader.read(65536):
                await connection.send(data)
            await connection.close()

        downward = asyncio.create_task(down())
        try:
            async for message in connection:
                assert isinstance(message, bytes)
                writer.write(message)
        finally:
            writer.close()
            downward.cancel()
            await asyncio.gather(downward, return_exceptions=True)
            with suppress(ProcessLookupError):  # it has ended already if it refused the connection
                process.kill()
            await process.wait()
