"""Tests of the liveness connection on a real worker: the manager and the agent notice its end."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path

import asyncssh
from rental_support import new_rental
from worker_support import SmallManager, Worker, WorkerNetwork, docker, wait_until, worker

from orion.manager.ssh.liveness import SshLiveness
from orion.manager.ssh.port import End, Host, Sign
from orion.manager.ssh.reach import SshReach

FROZEN_WITHIN_S = 5.0
"""Seconds on a busy machine; a worker takes one."""
KILL_SSHD = ("pkill", "-KILL", "-x", "sshd|sshd-session")


class LiveConnection:
    """A liveness connection to a worker, and its signs."""

    def __init__(self, on: Worker, manager: SmallManager) -> None:
        boot_id = manager.of("/api/register")[-1].body["boot_id"]
        liveness = SshLiveness(SshReach(on.key.file.read_text()))
        host = Host(worker_id=on.worker_id, address=on.address, host_keys=on.host_keys)
        self.signs: list[Sign] = []
        self.task = asyncio.create_task(self._hold(liveness, host, boot_id))

    async def _hold(self, liveness: SshLiveness, host: Host, boot_id: str) -> End:
        """Connect anew as the manager does, because a busy sshd may need more time than one attempt allows."""
        while (end := await liveness.hold(host, boot_id, self.signs.append)) is End.NOT_HELD and not self.signs:
            pass
        return end

    async def until(self, *signs: Sign, within_s: float = 60.0) -> None:
        deadline = time.monotonic() + within_s
        while self.signs != list(signs):
            assert time.monotonic() < deadline, self.signs
            await asyncio.sleep(0.02)


@asynccontextmanager
async def live_connection(on: Worker, manager: SmallManager) -> AsyncIterator[LiveConnection]:
    connection = LiveConnection(on, manager)
    await connection.until(Sign.HELD)
    yield connection
    connection.task.cancel()
    await asyncio.gather(connection.task, return_exceptions=True)


async def shown(on: Worker) -> str:
    return await asyncio.to_thread(on.run, "orion-rental", "inventory")


def log_with_times(on: Worker) -> str:
    done = subprocess.run(["docker", "logs", "--timestamps", on.name], capture_output=True, text=True, check=True)
    return done.stdout


async def test_a_liveness_connection_survives_a_restart_of_sshd_and_ends_with_the_container(
    network: WorkerNetwork, manager: SmallManager, join: Path, folder: Path
) -> None:
    manager.interval_s, manager.lease_s = 600.0, 3600.0  # no heartbeat is due meanwhile
    with worker(network, manager, join) as new:
        await asyncio.to_thread(new.wait_registered)
        rental = await asyncio.to_thread(new_rental(new, folder).create_quickly)

        async with live_connection(new, manager):
            quiet = time.monotonic()
        await asyncio.to_thread(
            wait_until, lambda: manager.of("/api/heartbeat", after=quiet), "the agent calls the next manager"
        )
        await asyncio.sleep(1.2)  # an agent without an answer would have frozen its rentals by then
        assert len(manager.of("/api/heartbeat", after=quiet)) == 1, "its only call was answered"
        assert '"running"' in await shown(new)

        async with live_connection(new, manager) as connection:
            ended = time.monotonic()
            await asyncio.to_thread(new.run, *KILL_SSHD)
            await connection.until(Sign.HELD, Sign.CLOSED, Sign.HELD)
            await asyncio.to_thread(wait_until, lambda: manager.of("/api/heartbeat", after=ended), "the agent calls")
            beats = manager.of("/api/heartbeat", after=ended)
            assert len(beats) == 1, "the agent called at once, and was answered"
            assert beats[0].at - ended < manager.interval_s / 2
            assert '"running"' in await shown(new)

            await asyncio.to_thread(docker, "kill", new.name)
            async with asyncio.timeout(60):
                assert await connection.task is End.GONE
            assert connection.signs[-1] is Sign.CLOSED
        assert rental.username


async def test_a_worker_that_loses_its_liveness_connection_and_gets_no_answer_freezes_in_a_second(
    network: WorkerNetwork, manager: SmallManager, join: Path, folder: Path
) -> None:
    manager.lease_s = 3600.0  # the lease does not end within the test
    with worker(network, manager, join) as new:
        await asyncio.to_thread(new.wait_registered)
        await asyncio.to_thread(new_rental(new, folder).create_quickly)
        async with live_connection(new, manager) as connection:
            await asyncio.to_thread(docker, "network", "disconnect", network.name, new.name)
            await asyncio.sleep(1.8)
            assert connection.signs == [Sign.HELD], "a cut ends no connection: the lease decides"
            assert '"running"' in await shown(new)
            killing = f"date +%s.%N; exec {shlex.join(KILL_SSHD)}"
            killed_at = float(await asyncio.to_thread(new.run, "sh", "-c", killing))
            await asyncio.to_thread(wait_until, lambda: '"frozen"' in new.run("orion-rental", "inventory"), "frozen")
            [said_at] = re.findall(r"^(\S+)Z .*no right to run", log_with_times(new), re.MULTILINE)
            frozen_at = datetime.fromisoformat(f"{said_at[:26]}+00:00").timestamp()
            assert frozen_at - killed_at < FROZEN_WITHIN_S, new.log()


async def test_a_liveness_connection_to_another_boot_of_the_container_is_not_held(
    network: WorkerNetwork, manager: SmallManager, join: Path
) -> None:
    with worker(network, manager, join) as new:
        await asyncio.to_thread(new.wait_registered)
        liveness = SshLiveness(SshReach(new.key.file.read_text()))
        signs: list[Sign] = []
        assert (
            await liveness.hold(
                Host(worker_id="w", address=new.address, host_keys=new.host_keys), "another-boot", signs.append
            )
            is End.NOT_HELD
        )
        assert signs == []


async def test_a_liveness_connection_that_was_never_made_proves_no_death(manager: SmallManager) -> None:
    liveness = SshLiveness(SshReach(manager.key.file.read_text()))
    key = manager.key.public
    assert (
        await liveness.hold(Host(worker_id="w", address="127.0.0.1", host_keys=(key,), port=9), "boot", lambda _: None)
        is End.NOT_HELD
    )


async def test_output_of_a_worker_on_its_liveness_connection_is_not_read(tmp_path: Path) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    sent = 0

    async def talk(process: asyncssh.SSHServerProcess[str]) -> None:
        nonlocal sent
        process.stdout.write("boot-0001\n")
        await process.stdout.drain()
        await asyncio.sleep(0.3)
        with suppress(OSError, asyncssh.Error):
            while sent < 2**28:
                process.stdout.write("x" * 2**16)
                await process.stdout.drain()
                sent += 2**16

    class OpenServer(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return True

        def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
            return True

        def public_key_auth_supported(self) -> bool:
            return True

    server = await asyncssh.listen(
        "127.0.0.1", 0, server_factory=OpenServer, server_host_keys=[key], process_factory=talk
    )
    liveness = SshLiveness(SshReach(key.export_private_key().decode()))
    host = Host(
        worker_id="w",
        address="127.0.0.1",
        host_keys=(key.export_public_key().decode().strip(),),
        port=server.get_port(),
    )
    signs: list[Sign] = []
    async with asyncio.timeout(60):
        assert await liveness.hold(host, "boot-0001", signs.append) is End.NOT_HELD
    assert signs == [Sign.HELD]
    assert sent < 2**24
    server.close()
