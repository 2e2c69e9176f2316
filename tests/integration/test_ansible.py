"""The real engine and the real reach keep the contract, on a real worker, with the repository's own playbooks."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_contract import (
    OTHER_KEY,
    EngineBench,
    EngineContract,
    ReachContract,
    account,
    assert_done,
    deletion,
    new_job,
)
from support.containers import pause
from worker_support import (
    ROOT,
    SmallManager,
    Worker,
    WorkerNetwork,
    docker,
    make_key,
    serving,
    takes_connections,
    wait_until,
    worker,
)

from orion.manager.ansible import client
from orion.manager.ansible.client import AnsibleEngine, ReachedAndExpected
from orion.manager.fakes.workers import Account
from orion.manager.ssh.port import Host, Reached
from orion.manager.ssh.reach import SshReach

MARGIN_S = 60.0
"""Seconds beyond a deadline within which an engine has answered, also on a machine that is far too busy."""


class Process:
    """The engine's process, as the entrypoint starts it."""

    def __init__(self, directory: Path, private_key: Path | None, playbooks: Path = ROOT / "playbooks") -> None:
        """Start the engine where there is a key for it."""
        self.playbooks = playbooks
        self.socket = directory / "engine.sock"
        self.directory = directory
        self.log = directory / "engine.log"
        if private_key:
            shutil.copy(private_key, directory / "id_ed25519")
            self.start()

    def start(self, stdout: int | None = None) -> None:
        command = [sys.executable, "-m", "orion.manager.ansible.server", "--socket", self.socket]
        command += ["--directory", self.directory, "--playbooks", self.playbooks]
        environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=stdout, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait_listening(self) -> None:
        wait_until(lambda: takes_connections(self.socket), "the engine listens")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class RealEngineBench(EngineBench):
    def __init__(self, on: Worker, process: Process) -> None:
        self.on = on
        self.process = process
        self.host = Host(worker_id="w-realreal", address=on.address, host_keys=on.host_keys)
        self.engine = AnsibleEngine(process.socket, MARGIN_S)
        self.reach = SshReach(on.key.file.read_text())

    async def accounts(self) -> dict[str, Account]:
        listed = json.loads(await self._run("orion-rental", "inventory"))
        items = listed["rentals"] if isinstance(listed, dict) else listed
        return {item["rental_id"]: await self._account(item) for item in items}

    async def _account(self, item: dict[str, str]) -> Account:
        unlocked = item["state"] == "running"
        file = f"/etc/orion/{'keys' if unlocked else 'locked'}/{item['username']}"
        keys = tuple(line.partition(" ")[2] for line in (await self._run("cat", file)).splitlines())
        return Account(
            username=item["username"], uid=int(item["uid"]), epoch=int(item["epoch"]), keys=keys, unlocked=unlocked
        )

    async def _run(self, *command: str) -> str:
        return await asyncio.to_thread(self.on.run, *command)

    async def pause(self) -> None:
        await asyncio.to_thread(pause, self.on.name)

    async def resume(self) -> None:
        docker("unpause", self.on.name)


@pytest.fixture(scope="module")
def calm_manager(network: WorkerNetwork, folder: Path) -> Iterator[SmallManager]:
    with serving(SmallManager(make_key(folder)), network.gateway) as manager:
        yield manager


@pytest.fixture(scope="module")
def mine(network: WorkerNetwork, calm_manager: SmallManager, join: Path) -> Iterator[Worker]:
    """Yield a worker that other tests do not share, because these pause it."""
    with worker(network, calm_manager, join) as made:
        made.wait_registered()
        yield made


@pytest.fixture(scope="module")
def second(network: WorkerNetwork, calm_manager: SmallManager, join: Path) -> Iterator[Worker]:
    with worker(network, calm_manager, join, slots=4) as made:
        made.wait_registered()
        yield made


@pytest.fixture(scope="module")
def process(folder: Path, calm_manager: SmallManager) -> Iterator[Process]:
    directory = folder / "engine"
    directory.mkdir(mode=0o700)
    process = Process(directory, calm_manager.key.file)
    process.wait_listening()  # the deadline of the first job does not include the start of the engine
    yield process
    process.end()
    wait_until(lambda: not processes_that_name(directory), "nothing that the engine started is left")


@pytest.fixture
async def bench(mine: Worker, process: Process) -> AsyncIterator[RealEngineBench]:
    bench = RealEngineBench(mine, process)
    yield bench
    await bench.engine.close()


class TestAnsibleEngine(EngineContract):
    async def test_a_start_command_reaches_the_renter_s_shell_unchanged_and_runs_once(
        self, bench: RealEngineBench
    ) -> None:
        said = "{{ 6 * 7 }} {% raw %} $(id -u) !unsafe \\ 'é"
        mark = f"1@{bench.on.run('cat', '/run/orion/boot-id').strip()}"
        job = new_job(bench.host).with_order(start=f"echo {shlex.quote(said)}", start_mark=mark)
        for started in (True, None):
            outcome = await bench.engine.run(job)
            assert_done(outcome)
            assert outcome.report.get("started") is started
        log = f"/home/{job.order.username}/.orion/start.log"
        printed = await asyncio.to_thread(
            wait_until,
            lambda: (t := bench.on.run("sh", "-c", f"cat {log} || true")).count("\n") == 3 and t,
            "the command has ended",
        )
        assert printed.splitlines()[1] == said
        assert_done(await bench.engine.run(deletion(job)))

    async def test_a_job_of_a_killed_engine_fails_with_that_reason_and_the_next_uses_the_new_engine(
        self, bench: RealEngineBench
    ) -> None:
        assert_done(await bench.engine.run(new_job(bench.host)))
        await bench.pause()
        running = asyncio.create_task(bench.engine.run(new_job(bench.host)))
        await asyncio.to_thread(wait_until, lambda: children(bench.process.process.pid), "the job runs")
        bench.process.kill()
        outcome = await running
        assert (outcome.ok, outcome.message) == (False, "the engine was restarted")
        await bench.resume()
        bench.process.start()
        job = new_job(bench.host, deadline_s=120.0)  # from here on, and the engine is only starting
        assert_done(await bench.engine.run(job))
        assert (await bench.accounts())[job.order.rental_id] == account(job)

    async def test_a_refusal_of_the_worker_has_its_code_in_the_report(self, bench: RealEngineBench) -> None:
        job = new_job(bench.host, epoch=2)
        await bench.engine.run(job)
        outcome = await bench.engine.run(job.with_order(epoch=1))
        assert outcome.report["code"] == "stale_epoch"

    async def test_a_kept_connection_to_a_worker_that_was_restarted_is_no_failure(self, bench: RealEngineBench) -> None:
        assert_done(await bench.engine.run(new_job(bench.host)))
        await asyncio.to_thread(docker, "restart", "--time", "10", bench.on.name)
        await asyncio.to_thread(bench.on.wait_registered)
        await asyncio.to_thread(wait_until, lambda: answers(bench.host), "its sshd is back")
        assert_done(await bench.engine.run(new_job(bench.host)))

    async def test_a_hanging_worker_does_not_delay_jobs_of_others(self, bench: RealEngineBench, second: Worker) -> None:
        other = Host(worker_id="w-other", address=second.address, host_keys=second.host_keys)
        for host in (bench.host, other):
            assert_done(await bench.engine.run(new_job(host)))
        await bench.pause()
        try:
            hanging = [asyncio.create_task(bench.engine.run(new_job(bench.host))) for _ in range(3)]
            others = [asyncio.create_task(bench.engine.run(new_job(other))) for _ in range(4)]
            await asyncio.wait([*hanging, *others], return_when=asyncio.FIRST_COMPLETED)
            assert not any(job.done() for job in hanging), "the others wait for them"
            for _ in range(2):  # without a limit of time: the job of the hanging worker may fail meanwhile
                others += [asyncio.create_task(bench.engine.run(new_job(other))) for _ in range(4)]
                assert {outcome.message for outcome in await asyncio.gather(*others)} == {""}
        finally:
            await bench.resume()
        for outcome in await asyncio.gather(*hanging):
            assert outcome.ok or outcome.message.startswith("the worker cannot be reached by SSH")
        assert_done(await bench.engine.run(new_job(bench.host)))


class TestSshReach(ReachContract):
    @pytest.fixture
    def bench(self, mine: Worker, folder: Path) -> RealEngineBench:
        """Return a bench whose engine is never started: the reach needs none."""
        return RealEngineBench(mine, Process(folder, None))

    async def test_a_worker_that_refuses_the_manager_s_key_is_not_reached(
        self, bench: RealEngineBench, folder: Path
    ) -> None:
        unknown = SshReach(make_key(folder).file.read_text())
        assert await unknown.reach(bench.host, 60) is Reached.NO

    async def test_a_job_for_a_port_that_accepts_and_sends_nothing_fails_in_time(self, bench: RealEngineBench) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as mute:
            silent = replace(bench.host, address="127.0.0.1", port=mute.getsockname()[1])
            async with asyncio.timeout(30):
                assert await bench.reach.reach(silent, 0.2) is Reached.NO

    async def test_a_job_with_an_invalid_host_key_makes_no_connection(self, bench: RealEngineBench) -> None:
        broken = replace(bench.host, host_keys=(OTHER_KEY[:-6],))
        assert await bench.reach.reach(broken, 60) is Reached.NO


async def test_other_tasks_of_a_playbook_use_the_kept_connection(
    mine: Worker, folder: Path, calm_manager: SmallManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "EXPECT_WITHIN_S", MARGIN_S)
    playbooks = folder / "extended"
    shutil.copytree(ROOT / "playbooks", playbooks)
    added = "    - name: What an operator added\n      ansible.builtin.command: hostname\n"
    with (playbooks / "create_user.yml").open("a") as playbook:
        playbook.write(added)
    directory = folder / "kept"
    directory.mkdir(mode=0o700)
    process = Process(directory, calm_manager.key.file, playbooks)
    engine = AnsibleEngine(process.socket)
    host = Host(worker_id="w-extended", address=mine.address, host_keys=mine.host_keys)
    try:
        await asyncio.to_thread(process.wait_listening)
        assert (
            await ReachedAndExpected(SshReach(calm_manager.key.file.read_text()), engine).reach(host, 60) is Reached.YES
        )
        await asyncio.to_thread(
            wait_until, lambda: len(held_connections(directory)) == 1, "it is opened before any order"
        )
        assert_done(await engine.run(new_job(host)))
        assert len(held_connections(directory)) == 1
    finally:
        await engine.close()
        process.end()


def held_connections(directory: Path) -> list[str]:
    return [line for line in processes_that_name(directory) if line.startswith("ssh")]


def processes_that_name(directory: Path) -> list[str]:
    """Command lines in which it is found, of processes that live."""
    lines = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            lines.append(place.read_bytes().decode(errors="replace"))  # of whatever other tests start
    return [line for line in lines if str(directory) in line]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def answers(host: Host) -> bool:
    with socket.socket() as caller:
        caller.settimeout(1)
        with suppress(OSError):  # it accepts connections and sends nothing yet
            return caller.connect_ex((host.address, host.port)) == 0 and caller.recv(4) == b"SSH-"
    return False


def test_the_engine_ends_at_sigterm(process: Process) -> None:
    process.wait_listening()
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(60) == 0
    process.start()
    process.wait_listening()


def test_the_engine_starts_with_non_blocking_output(process: Process) -> None:
    process.end()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process.start(stdout=writing)
    process.wait_listening()
    os.close(reading)
    os.close(writing)
