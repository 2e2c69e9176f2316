"""A worker in the hands of an attacker, against the engine that comes to it by SSH: it must stay that one worker.

The attacker is root in the worker's container: it answers in place of Python, of orion-rental, or of sshd. Nothing
here knows how the engine works: a job goes in by the port, and whatever the worker does, it is answered in time, the
worker's words are data, and the honest worker beside it is served.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_contract import account, assert_done, new_job
from test_ansible import Process, RealEngineBench
from worker_support import SmallManager, Worker, WorkerNetwork, wait_until, worker

from orion.manager.ansible.port import Job, Outcome
from orion.manager.ssh.port import Host, Reached

DEADLINE_S = 2.5
MARGIN_S = 40.0
"""Seconds within which an engine that kills late jobs has answered by itself, also on a very busy machine."""
MOST_MEMORY = 512 << 20
"""That all processes of the engine may take more than they did before."""

WRAPPER = """#!/bin/bash
# In place of /usr/bin/python3: the attacker chooses what each run of it is.
case $(cat /run/evil) in
hang) exec sleep 600 ;;
output) exec yes "{}" ;;
errors) exec yes "{}" >&2 ;;
slowly) printf '{"changed": tr'; while sleep 0.3; do printf ' '; done ;;
nothing) exit 0 ;;
garbage) head -c 3000000 /dev/urandom; exit 0 ;;
deep) head -c 2000000 /dev/zero | tr '\\0' '['; exit 0 ;;
esac
exec /usr/bin/python3.13 "$@"
"""
LIAR = """#!/usr/bin/python3.13
import json, sys
said = open("/run/evil-report").read()
if sys.argv[1:] != ["serve"]:
    sys.exit(sys.stdout.write(said) * 0)
print('{"ready": true}', flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    try:
        report = json.loads(said)
    except ValueError:
        print(said, flush=True)
        continue
    if isinstance(report, dict):
        report["rentals"] = [dict(report) for _ in asked["request"]["rentals"]]
    print(json.dumps({"id": asked["id"], "status": 0, "report": report}), flush=True)
"""


class Evil:
    """The attacker's own worker."""

    def __init__(self, on: Worker) -> None:
        self.on = on
        self.host = Host(worker_id="w-evilevil", address=on.address, host_keys=on.host_keys)
        self.become("honest")
        self._replace("/usr/bin/python3", WRAPPER)

    def become(self, mode: str) -> None:
        """Change its behaviour from the next connection on, and break off those that the engine keeps."""
        self._replace("/run/evil", mode)
        kept = self._ssh_to_it()
        self.on.run("sh", "-c", "pkill -KILL -f '^sshd-session' || true")
        # Otherwise the engine may still use one of them, and gets the error that it was closed.
        wait_until(lambda: not any(map(_is_running, kept)), "the connections that were there have ended")

    def answer(self, report: object) -> None:
        """Replace the output of its orion-rental from now on."""
        self._replace("/run/evil-report", report if isinstance(report, str) else json.dumps(report))
        self._replace("/usr/local/sbin/orion-rental", LIAR)
        self.become("liar")

    def _ssh_to_it(self) -> set[int]:
        """Return the processes of ssh on this machine that connect to it."""
        found = set()
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                arguments = (place / "cmdline").read_bytes().split(b"\0")
                if arguments[0] == b"ssh" and self.on.address.encode() in arguments:
                    found.add(int(place.name))
        return found

    def _replace(self, path: str, text: str) -> None:
        write = f"cat > {path}.new && chmod 755 {path}.new && mv -f {path}.new {path}"
        command = ["docker", "exec", "-i", self.on.name, "sh", "-c", write]
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)


@pytest.fixture(scope="module")
def evil(network: WorkerNetwork, shared_manager: SmallManager, join: Path) -> Iterator[Evil]:
    with worker(network, shared_manager, join) as made:
        made.wait_registered()
        yield Evil(made)


@pytest.fixture(scope="module")
def process(folder: Path, shared_manager: SmallManager) -> Iterator[Process]:
    directory = folder / "attacked-engine"
    directory.mkdir(mode=0o700)
    process = Process(directory, shared_manager.key.file)
    process.wait_listening()  # the deadline of the first job does not include the start of the engine
    yield process
    process.end()


@pytest.fixture
async def bench(host: Worker, process: Process) -> AsyncIterator[RealEngineBench]:
    """Yield the engine with an honest worker."""
    bench = RealEngineBench(host, process)
    yield bench
    await bench.engine.close()


async def timed(bench: RealEngineBench, job: Job) -> tuple[Outcome, float]:
    began = time.monotonic()
    return await bench.engine.run(job), time.monotonic() - began


async def serve_beside(bench: RealEngineBench, hosts: list[Host]) -> list[Outcome]:
    """Run a hostile job on each of the hosts and an honest one beside them; return the outcomes of the hostile ones."""
    hostile = [asyncio.create_task(timed(bench, new_job(host, deadline_s=DEADLINE_S))) for host in hosts]
    await asyncio.sleep(0.2)
    job = new_job(bench.host)
    assert_done(await bench.engine.run(job))
    ended = await asyncio.gather(*hostile)
    assert max(took_s for _, took_s in ended) < DEADLINE_S + MARGIN_S
    assert (await bench.accounts())[job.order.rental_id] == account(job)
    return [outcome for outcome, _ in ended]


# In place of Python: whatever comes back, or does not


@pytest.mark.parametrize("mode", ["hang", "output", "errors", "slowly", "nothing", "garbage", "deep"])
async def test_an_invalid_answer_of_a_worker_is_a_timely_failure_without_effect_on_others(
    bench: RealEngineBench, evil: Evil, mode: str
) -> None:
    evil.become(mode)
    with memory_of(bench.process.process.pid) as most:
        (outcome,) = await serve_beside(bench, [evil.host])
    assert not outcome.ok
    assert len(outcome.message) <= 1000
    assert outcome.message.isprintable()
    assert most() < MOST_MEMORY, f"{most() >> 20} MB"


async def test_a_job_does_not_wait_for_a_hanging_worker_of_the_same_run(bench: RealEngineBench, evil: Evil) -> None:
    """Start both jobs in the same instant, so that the engine may put them into one run."""
    evil.become("hang")
    hanging = asyncio.create_task(bench.engine.run(new_job(evil.host, deadline_s=25.0)))
    assert_done(await bench.engine.run(new_job(bench.host)))
    assert not hanging.done()
    await bench.engine.close()
    assert not (await hanging).ok


# In place of orion-rental: a report that is more than a report


def lies(mark: Path, honest: Host) -> dict[str, object]:
    run = f"touch {mark}"
    template = f"{{{{ lookup('pipe', '{run}') }}}}"
    trusted = {"__ansible_type": "TrustedAsTemplate", "value": template}
    tagged = {
        "__ansible_type": "_AnsibleTaggedStr",
        "value": template,
        "tags": [{"__ansible_type": "TrustedAsTemplate"}],
    }
    variables = {
        "ansible_connection": "local",
        "ansible_host": honest.address,
        "ansible_python_interpreter": f"/bin/sh -c '{run}'",
        "ansible_ssh_common_args": f"-o ProxyCommand='{run}' -o PermitLocalCommand=yes -o LocalCommand='{run}'",
        "ansible_ssh_executable": f"/usr/bin/env {run}",
        "ansible_remote_tmp": f"$({run})",
        "ansible_become_exe": run,
        "rental_id": template,
        "epoch": template,
    }
    return {
        "changed": True,
        "epoch": 1,
        "ansible_facts": variables | {"name": template, "tagged": tagged, "trusted": trusted},
        "add_host": {"host_name": honest.worker_id, "groups": ["workers"], "host_vars": variables},
        "add_group": "workers",
        "include": str(mark),
        "include_args": {"_raw_params": template},
        "ansible_stats": {"data": {"x": template}, "per_host": True, "aggregate": True},
        "ansible_included_var_files": [template],
        "_ansible_delegated_vars": {"ansible_host": "127.0.0.1", "ansible_delegated_host": "localhost"},
        "_ansible_notify": [template],
        "results": [{"ansible_facts": variables, "add_host": {"host_name": "localhost"}}],
        "msg": template,
        "tagged": tagged,
        "trusted": trusted,
        "warnings": [template, "\x1b[2J"],
        "deprecations": [{"msg": template, "version": "1"}],
        "exception": template,
        "diff": [{"before": template, "after": template}],
    }


@pytest.mark.parametrize("failed", [False, True])
async def test_facts_hosts_templates_and_paths_in_a_worker_s_report_have_no_effect(
    bench: RealEngineBench, evil: Evil, tmp_path: Path, failed: bool
) -> None:
    mark = tmp_path / "mark"
    before = await bench.accounts()
    evil.answer(lies(mark, bench.host) | ({"failed": True} if failed else {}))
    job = new_job(evil.host)
    lied = await bench.engine.run(job)
    assert lied.report.get("ansible_facts") is None
    after = new_job(bench.host)
    assert_done(await bench.engine.run(after))
    again = await bench.engine.run(job.with_order(epoch=2))
    assert again.ok == lied.ok, "its own next job is one on itself again"
    assert not mark.exists()
    assert await bench.accounts() == before | {after.order.rental_id: account(after)}


async def test_an_enormous_report_is_cut_and_an_invalid_report_is_a_failure(bench: RealEngineBench, evil: Evil) -> None:
    evil.answer({"changed": True, "epoch": 1, "looked": ["x" * 1000] * 4000, "left": []})
    outcome = await bench.engine.run(new_job(evil.host))
    assert len(json.dumps(outcome.report)) < 1 << 18
    for none in ("", "7", "[]", "{" * 5000, "\x00\x1b[2J"):
        evil.answer(none)
        outcome = await bench.engine.run(new_job(evil.host))
        assert not outcome.ok, none
        assert outcome.message.isprintable()


# In place of sshd


class FakeSshd:
    """A port at which something else than sshd is; each connection is handled in a thread of its own."""

    def __init__(self, behave: Callable[[socket.socket], None]) -> None:
        self._behave = behave
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()
        self._open: list[socket.socket] = []

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                accepted, _ = self._listening.accept()
                self._open.append(accepted)
                thread = threading.Thread(target=self._handle, args=(accepted,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _handle(self, peer: socket.socket) -> None:
        with suppress(OSError), peer:  # the caller hung up
            self._behave(peer)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for peer in self._open:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


VERSION = b"SSH-2.0-OpenSSH_10.0\r\n"


def says_nothing(peer: socket.socket) -> None:
    while peer.recv(4096):
        pass


def talks_for_ever(peer: socket.socket) -> None:
    while True:
        peer.sendall(b"before the version, anything may be said\r\n" * 1000)


def talks_without_an_end_of_line(peer: socket.socket) -> None:
    while True:
        peer.sendall(b"x" * 65536)


def speaks_slowly(peer: socket.socket) -> None:
    for byte in VERSION * 1000:
        peer.sendall(bytes([byte]))
        time.sleep(0.1)


def promises_a_huge_packet(peer: socket.socket) -> None:
    peer.sendall(VERSION + b"\xff\xff\xff\xff" + b"\x00" * 65536)
    says_nothing(peer)


def begins_and_stops(peer: socket.socket) -> None:
    peer.sendall(VERSION)
    says_nothing(peer)


def hangs_up(peer: socket.socket) -> None:
    peer.recv(1)


BEHAVIOURS = (
    says_nothing,
    talks_for_ever,
    talks_without_an_end_of_line,
    speaks_slowly,
    promises_a_huge_packet,
    begins_and_stops,
    hangs_up,
)


@pytest.fixture
def fakes(evil: Evil) -> Iterator[list[Host]]:
    running = [FakeSshd(behave) for behave in BEHAVIOURS]
    yield [replace(evil.host, worker_id=f"w-fake{n}", address="127.0.0.1", port=f.port) for n, f in enumerate(running)]
    for fake in running:
        fake.close()


async def test_a_job_for_a_server_that_is_no_sshd_fails_in_time_without_effect_on_others(
    bench: RealEngineBench, fakes: list[Host]
) -> None:
    with memory_of(bench.process.process.pid) as most:
        for few in (fakes[:3], fakes[3:6], fakes[6:]):  # no more than leave room in an engine of four
            assert not any(outcome.ok for outcome in await serve_beside(bench, few))
    assert most() < MOST_MEMORY, f"{most() >> 20} MB"


async def test_a_reach_of_a_server_that_is_no_sshd_fails_in_time(bench: RealEngineBench, fakes: list[Host]) -> None:
    began = time.monotonic()
    reached = await asyncio.gather(*(bench.reach.reach(host, 1.0) for host in fakes))
    assert set(reached) == {Reached.NO}
    assert time.monotonic() - began < 1.0 + MARGIN_S
    assert await bench.reach.reach(bench.host, 60) is Reached.YES


# Memory and connections


@contextmanager
def memory_of(pid: int) -> Iterator[Callable[[], int]]:
    """Yield the most bytes by which the memory of a process and its descendants grew while the block ran."""
    seen = [_family_memory(pid)]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            seen.append(_family_memory(pid))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield lambda: max(seen) - seen[0]
    finally:
        ended.set()
        watching.join()


def _is_running(pid: int) -> bool:
    """Return whether a process has not ended yet: its files stay open until then."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def _family_memory(pid: int) -> int:
    """Return the private memory of each; memory that a fork shares counts once."""
    family, total = [pid], 0
    for member in family:
        with suppress(OSError):
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in rollup if line.startswith("Pss:"))
            family += map(int, Path(f"/proc/{member}/task/{member}/children").read_text().split())
    return total
