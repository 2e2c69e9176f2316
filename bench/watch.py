"""The cost of the manager's liveness connections: the real SshLiveness on 1,000 SSH servers in one other process.

The servers send a keepalive every 15 s, as the sshd of a worker does (worker/sshd_config). An idle liveness connection
carries nothing else.

The two processes run `python -m bench.watch serve|hold NUMBER PORT KEYS`.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncssh

from bench.processes import cpu_s, memory_mb
from bench.report import Result, Row
from orion.manager.ssh.liveness import SshLiveness
from orion.manager.ssh.port import Host, Sign
from orion.manager.ssh.reach import SshReach

REST_S = 30.0
WITHIN_S = 180.0
CLIENT_ALIVE_S = 15
BOOT_ID = "boot-0001"


def measure(number: int) -> Result:
    with TemporaryDirectory(prefix="orion-bench-") as folder:
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(f"{folder}/key")
        asyncssh.read_private_key(f"{folder}/key").write_public_key(f"{folder}/key.pub")
        serving = _start("serve", number, 0, folder)
        assert serving.stdout  # noqa: S101 - it is a pipe
        port = int(serving.stdout.readline())
        holding = _start("hold", number, port, folder)
        output = holding.communicate(timeout=WITHIN_S + REST_S + 30)[0]
        serving.kill()
        serving.wait()
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    result = Result("watch", f"{number} liveness connections of one manager")
    units = {
        "memory": "KB",
        "descriptors": "",
        "processor, at rest": "%",
        "processor, to begin": "ms",
        "to begin all": "s",
    }
    for label, value in found.items():
        each = label in {"memory", "descriptors", "processor, to begin"}
        result.rows.append(Row(f"{label}{' of each' if each else ''}", units[label], number, value))
    result.at_most("processor, at rest", found["processor, at rest"], 5.0, " %")
    return result


class _Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return True


async def _hello(process: asyncssh.SSHServerProcess[str]) -> None:
    """Answer as the agent of a worker: its boot id, then silence until the client disconnects."""
    process.stdout.write(f"{BOOT_ID}\n")
    await process.stdin.read()
    process.exit(0)


async def _serve(folder: Path) -> None:
    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=_Server,
        process_factory=_hello,
        server_host_keys=[str(folder / "key")],
        keepalive_interval=CLIENT_ALIVE_S,
        login_timeout=0,
        backlog=1024,
    )
    print(server.get_port(), flush=True)
    await asyncio.Event().wait()


async def _hold(number: int, port: int, folder: Path) -> None:
    liveness = SshLiveness(SshReach((folder / "key").read_text()))
    host = Host(worker_id="w", address="127.0.0.1", host_keys=((folder / "key.pub").read_text().strip(),), port=port)
    signs: list[Sign] = []
    memory, descriptors, processor, began = memory_mb(os.getpid()), _descriptors(), cpu_s(os.getpid()), time.monotonic()
    holding = [asyncio.create_task(liveness.hold(host, BOOT_ID, signs.append)) for _ in range(number)]
    while len(signs) < number:
        assert time.monotonic() < began + WITHIN_S, f"{len(signs)} of {number} connections are open"  # noqa: S101
        await asyncio.sleep(0.1)
    begun_s, begun_cpu_s = time.monotonic() - began, cpu_s(os.getpid()) - processor
    rest = cpu_s(os.getpid())
    await asyncio.sleep(REST_S)
    rest = cpu_s(os.getpid()) - rest
    found = {
        "memory": 1024 * (memory_mb(os.getpid()) - memory) / number,
        "descriptors": (_descriptors() - descriptors) / number,
        "processor, to begin": 1000 * begun_cpu_s / number,
        "to begin all": begun_s,
        "processor, at rest": 100 * rest / REST_S,
    }
    print(json.dumps({label: round(value, 2) for label, value in found.items()}), flush=True)
    os._exit(0 if len(holding) == number else 1)


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _start(what: str, number: int, port: int, folder: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.watch", what, str(number), str(port), folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def main() -> None:
    what, number, port, folder = sys.argv[1:]
    most = int(number) + 100
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, hard), hard))
    work = _serve(Path(folder)) if what == "serve" else _hold(int(number), int(port), Path(folder))
    asyncio.run(work)


if __name__ == "__main__":
    main()
