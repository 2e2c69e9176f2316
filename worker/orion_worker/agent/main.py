"""The agent: the main process of a worker's container. If it dies, the container ends.

It locks all rentals, starts sshd and restarts it when it dies, and calls home for ever. On SIGTERM it waits, as long as
the grace lasts, until the manager has migrated its rentals to other workers or parked them; then it locks all rentals,
says goodbye and ends. The calls have a thread of their own, so that a slow request never delays the goodbye; and the
fence has one, so that nothing delays the freezing of rentals that may not run any more.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from orion_worker.agent import fence
from orion_worker.agent.call_home import REQUEST_TIMEOUT_S, HomeCaller, post_by_http
from orion_worker.agent.confined import ConfinedCommand
from orion_worker.agent.decisions import may_run, stop_grace_s
from orion_worker.agent.node import AgentSettings, Node, settings_from
from orion_worker.limits import priority, scores, stopped_log_ins
from orion_worker.limits.log_limit import LimitedLog
from orion_worker.limits.terminals import TerminalGuard
from orion_worker.rental.host_certificate import RunningSshd
from orion_worker.rpc import liveness_program
from orion_worker.rpc.liveness import LivenessListener
from orion_worker.system import cgroup, processes
from orion_worker.system.repeat import look_for_ever

WEB_PORT = 80
"""The port on which the proxy reaches the web ports of rentals. It is below 1024, so that no renter can take it."""
PORT_PROXY = "/usr/local/lib/orion/orion-web"

LOOK_EVERY_S = 0.5
LOOK_OFTEN_S = 0.1
AFTER_A_FAULT_S = 5.0
RENTERS_NICENESS = 5
"""The nice value of sshd and all sessions: the agent gets the processor first when renters use all of it."""


class SshdChild:
    """sshd, as a child of start/confine.py that is started again whenever it dies.

    Sessions inherit its limit of processes, which does not apply to root, and its score, below which no renter gets
    (start/confine.py): the kernel ends them before the agent. It ends sshd no later than a renter's process of the same
    size, but the processes of the rental that uses the most memory first (limits/scores.py).
    """

    def __init__(self, settings: AgentSettings, errors: int) -> None:
        limit = cgroup.usage(cgroup.read_file).processes_limit
        each = cgroup.processes_for_each_renter(limit, settings.slots)
        command = ["prlimit", f"--nproc={each}:{each}", "--", "nice", "-n", str(RENTERS_NICENESS), "--"]
        # The manager reaches every worker from one address: a renter's failed log-ins must not shut it out.
        command += ["/usr/sbin/sshd", "-D", "-e", "-o", f"PerSourcePenaltyExemptList={settings.app_address}"]
        self._listening = RunningSshd(Path("/"))
        self._command = ConfinedCommand(command, scores.usual(processes.own_score()), errors)
        say(f"each renter may have {each} processes")
        self._start()

    def ensure_running(self) -> None:
        status = self._command.ended()
        if status is not None:
            say(f"sshd ended with status {status}: starting it again")
            self._start()

    def stop(self) -> None:
        self._command.stop()

    def _start(self) -> None:
        self._listening.pid_file.unlink(missing_ok=True)
        self._command.start()


class PortProxyChild:
    """The port proxy (web/port_proxy.py), as a child that is started again whenever it dies.

    The agent keeps the listening socket, so no connection is refused meanwhile. The child is not started at once,
    because SSH to the worker comes first.
    """

    def __init__(self, settings: AgentSettings) -> None:
        self._command = [PORT_PROXY, settings.proxy_address, settings.app_address, str(settings.slots)]
        self._socket = socket.create_server(("0.0.0.0", WEB_PORT), backlog=256)  # noqa: S104 - see network.nft
        self._child: subprocess.Popen[bytes] | None = None

    def ensure_running(self) -> None:
        status = self._child.poll() if self._child else None
        if status is not None:
            say(f"the port proxy ended with status {status}: starting it again")
        if self._child is None or status is not None:
            self._child = subprocess.Popen(self._command, stdin=self._socket.fileno())

    def stop(self) -> None:
        if self._child:
            self._child.kill()
            self._child.wait()


def say(line: str) -> None:
    write(f"orion-agent: {line}")


def write(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the container's log


def call_for_ever(home: HomeCaller, stopping: threading.Event, hurry: threading.Event) -> None:
    """Call home until `stopping` is set. `hurry` is set when the next call may be due earlier, and at the end."""
    wait_s = 0.0
    while not stopping.is_set():
        if hurry.wait(wait_s):
            hurry.clear()
            wait_s = min(wait_s, home.due_s())
            continue
        try:
            wait_s = home.step()
        except Exception as fault:
            # A full disk or an unforeseen reply must not end a container that renters work in.
            where = traceback.extract_tb(fault.__traceback__)[-1]
            say(f"unexpected: {fault!r} at {Path(where.filename).name}:{where.lineno}; calling again")
            wait_s = AFTER_A_FAULT_S


def wait_while_evacuating(home: HomeCaller, node: Node, settings: AgentSettings, sshd: SshdChild) -> None:
    """Wait until no rental is left here, or the grace is over, which depends on the files that are to be carried."""
    began = time.monotonic()
    deadline = began + stop_grace_s(settings.stop_grace_s, settings.stop_grace_max_s, *node.to_be_carried())
    while home.is_evacuating() and time.monotonic() < deadline:
        sshd.ensure_running()
        time.sleep(LOOK_OFTEN_S)


def exit_in_order(home: HomeCaller, calling: threading.Thread) -> None:
    """Lock all rentals and say goodbye; first wait for the answer to a registration that is under way.

    A worker that ended before it had kept that answer would register as another one at its next start, and the first
    would be listed as down until an operator removes it.
    """
    home.begin_exit()
    if not home.is_registered:
        calling.join(REQUEST_TIMEOUT_S)
    home.say_goodbye()


def run(settings: AgentSettings) -> None:
    """Run the agent until SIGTERM or SIGINT."""
    stop_requested, stopping, hurry = threading.Event(), threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop_requested.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))  # blocked by entrypoint.sh
    node = Node(settings, say)
    node.lock_all()
    guard = fence.Fence(node.rentals, lambda: may_run(home.lease, home.liveness_ended_at, boot_time_s()), say)
    guard.begin()
    node.rentals.launcher.set_boot_id(node.boot_id)
    home = HomeCaller(
        node=node,
        post=partial(post_by_http, settings.url),
        clock=boot_time_s,
        chance=random.random,
        say=say,
        on_renewal=guard.lease_renewed,
    )

    def liveness_ended() -> None:
        home.liveness_ended_at = boot_time_s()
        say("the manager's liveness connection has ended")
        hurry.set()

    def liveness_closed() -> None:
        home.liveness_closed_at = boot_time_s()
        hurry.set()

    liveness = LivenessListener(
        place=Path(liveness_program.SOCKET_PATH),
        boot_id=node.boot_id,
        on_end=liveness_ended,
        on_orderly_end=liveness_closed,
    )
    log = LimitedLog(write)
    sshd = SshdChild(settings, log.input)
    port_proxy = PortProxyChild(settings)
    oom_scores = scores.OomScores(scores.usual(processes.own_score()))
    log_ins = stopped_log_ins.StoppedLogIns(node.rentals, say)
    looks: tuple[tuple[Callable[[], object], float, str], ...] = (
        (guard.look, fence.LOOK_EVERY_S, "the fence"),
        (oom_scores.look, scores.LOOK_EVERY_S, "the scores for when memory is used up"),
        (priority.lower_crowds, priority.LOOK_EVERY_S, "the priority of renters"),
        (log_ins.look, stopped_log_ins.LOOK_EVERY_S, "stopped log-ins"),
    )
    for look, every_s, name in looks:
        threading.Thread(target=look_for_ever, args=(look, every_s, say, name), daemon=True).start()
    for work in (log.run, liveness.run, TerminalGuard(end=node.end_all, say=say).run):
        threading.Thread(target=work, daemon=True).start()
    calling = threading.Thread(target=call_for_ever, args=(home, stopping, hurry), daemon=True)
    calling.start()
    while not stop_requested.wait(LOOK_EVERY_S):
        sshd.ensure_running()
        port_proxy.ensure_running()
    say("stop requested")
    home.evacuate()
    hurry.set()
    wait_while_evacuating(home, node, settings, sshd)
    stopping.set()
    hurry.set()
    exit_in_order(home, calling)
    port_proxy.stop()
    sshd.stop()


def boot_time_s() -> float:
    """Return CLOCK_BOOTTIME, which counts while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> int:
    try:
        settings = settings_from(os.environ)
    except ValueError as error:
        say(str(error))
        return 2
    say(f"calling home to {settings.url}")
    run(settings)
    return 0
