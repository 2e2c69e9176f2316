"""Attacks of a renter on resources that all containers of a kernel share, or all renters of a worker."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from orion_worker.limits.log_limit import BURST, LINE_EVERY_S
from orion_worker.limits.priority import CROWD
from orion_worker.limits.terminals import AGAIN_S, MOST_HELD, MOST_HIDDEN
from orion_worker.system.processes import LOWEST_PRIORITY
from proxy_support import free_port
from rental_support import Rental, new_rental
from worker_support import Worker, docker, wait_until


@pytest.fixture
def rental(host: Worker, folder: Path) -> Iterator[Rental]:
    made = new_rental(host, folder).create_quickly()
    yield made
    assert host.rental("purge", **made.variables)[0] == 0


@pytest.fixture
def elsewhere(neighbour: Worker, folder: Path) -> Rental:
    """Another renter of another worker."""
    return new_rental(neighbour, folder).create_quickly()


@contextmanager
def running(rental: Rental, program: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python program of the renter from its first line of output until the block ends."""
    command = [*rental.on.ssh_command(rental.username, rental.key), "exec python3 -u -"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True) as begun:
        assert begun.stdin is not None
        begun.stdin.write(program)
        begun.stdin.close()
        try:
            yield begun
        finally:
            rental.on.run("pkill", "-KILL", "-u", str(rental.uid), check=False)
            begun.kill()


def terminal(of: Rental) -> str:
    """Return the name of the terminal that a log-in gets; empty where there is none."""
    return of.ssh("tty", "", "-tt").stdout.strip()


def has_more(rental: Rental) -> bool:
    """Return whether a program of the renter's, such as tmux, gets a terminal."""
    return rental.ssh("python3 -c 'import os; os.openpty()'").returncode == 0


OPEN_ALL = """
import fcntl, os, time
held = []
try:
    while True:
        master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
        if HIDE:
            fcntl.ioctl(master, 0x40045431, bytes(4))
            held.append(fcntl.ioctl(master, 0x5441, os.O_RDWR | os.O_NOCTTY))
            os.close(master)
            time.sleep(0.005)
        else:
            held.append(master)
except OSError as error:
    print(error.errno, len(held))
time.sleep(600)
"""
"""The program hides terminals no faster than the worker searches them, also after seconds without a processor: a renter
with MOST_HIDDEN terminals is killed before it could print their number."""
SHUT, NO_MORE = 13, 28


def test_a_renter_that_opens_endless_terminals_leaves_terminals_for_all_others(
    rental: Rental, roommate: Rental, elsewhere: Rental
) -> None:
    with running(rental, OPEN_ALL.replace("HIDE", "False")) as attack:
        assert attack.wait(60) != 0, "it was ended"
        assert str(NO_MORE) not in {line.split()[0] for line in attack.stdout or ()}
        for other in (roommate, elsewhere, rental):
            assert terminal(other).startswith("/dev/pts/")
        wait_until(lambda: has_more(roommate), "there are more")


def test_a_renter_that_hides_its_terminals_takes_no_more_than_a_share(
    rental: Rental, roommate: Rental, elsewhere: Rental
) -> None:
    """No search finds the owner of hidden terminals. Log-ins get theirs from root; other containers do not count."""
    with running(rental, OPEN_ALL.replace("HIDE", "True")) as attack:
        assert attack.stdout is not None
        error, count = map(int, attack.stdout.readline().split())
        assert error == SHUT
        assert MOST_HELD - 16 < count < MOST_HIDDEN
        for other in (roommate, elsewhere):
            assert terminal(other).startswith("/dev/pts/")
        assert has_more(elsewhere)
        time.sleep(2 * AGAIN_S)
        assert not has_more(roommate), "as long as the renter has them"
        assert attack.poll() is None
    wait_until(lambda: has_more(roommate), "there are more")


def test_a_renter_that_is_refused_a_thousand_times_a_second_does_not_fill_the_log(rental: Rental) -> None:
    port = free_port()
    log = len(rental.on.log().splitlines())
    command = rental.on.ssh_command(rental.username, rental.key, "-N", "-D", f"127.0.0.1:{port}")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as client:
        try:
            wait_until(lambda: is_there(port), "the client listens")
            began = time.monotonic()
            tried = sum(is_refused(port) for _ in range(10 * BURST))
        finally:
            client.kill()
    assert tried == 10 * BURST
    wait_until(lambda: len(rental.on.log().splitlines()) - log > BURST / 2, "the first of its lines are logged")
    said = rental.on.log().splitlines()[log:]
    assert len(said) < 2 * BURST + (time.monotonic() - began) / LINE_EVERY_S
    wait_until(lambda: "lines of sshd's were left out" in rental.on.log(), "that is logged")
    before = number_of_log_ins(rental)
    wait_until(lambda: rental.accepts() and number_of_log_ins(rental) > before, "its other lines are logged")


def number_of_log_ins(rental: Rental) -> int:
    return rental.on.log().count(f"Accepted publickey for {rental.username} ")


def is_there(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def is_refused(port: int) -> bool:
    """Ask a client of SSH (SOCKS) for a connection that sshd refuses."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(b"\5\1\0")
        client.recv(2)
        client.sendall(b"\5\1\0\1\x0a\xff\xff\1\0\x50")
        return client.recv(10)[:2] != b"\5\0"


CONNECTIONS = 16384
"""Of a renter, as in network.nft."""
SEND = """
import errno, socket
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
refused = 0
for number in range({first}, {first} + {count}):
    try:
        sender.sendto(b"x", ({address}, {port}))
    except OSError as error:
        assert error.errno in (errno.EPERM, errno.EHOSTUNREACH, errno.ECONNREFUSED), error
        refused += error.errno != errno.ECONNREFUSED
print(refused)
"""


def followed(worker: Worker) -> int:
    """Return how many connections the kernel follows for a worker's container."""
    return int(worker.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count"))


def test_a_renter_does_not_fill_the_kernels_table_of_connections(rental: Rental, roommate: Rental) -> None:
    before = followed(rental.on)
    address = '"127.%d.%d.%d" % (1 + (number >> 16), number >> 8 & 255, number & 255)'
    assert rental.python(SEND.format(first=0, count=30_000, address=address, port=9)) == "0\n"
    assert followed(rental.on) < before + 100, "connections within the container are not tracked"
    name_server = SEND.format(first=1024, count=CONNECTIONS + 2000, address='"127.0.0.11"', port="number")
    assert int(rental.python(name_server)) >= 1000
    assert CONNECTIONS / 2 < followed(rental.on) - before < CONNECTIONS + 1000
    assert roommate.python(SEND.format(first=1024, count=100, address='"127.0.0.11"', port="number")) == "0\n"
    assert roommate.accepts()
    assert roommate.ssh("getent hosts localhost").returncode == 0


KEEP_MEMORY = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
message = ctypes.create_string_buffer(8 + 8192)
message[0] = 1
def segment():
    made = libc.shmget(0, 16 << 20, 0o1600)
    if made >= 0:
        at = libc.shmat(made, None, 0)
        ctypes.memset(at, 1, 16 << 20)
        libc.shmdt(ctypes.c_void_p(at))
    return made
def queue():
    made = libc.msgget(0, 0o1600)
    while made >= 0 and libc.msgsnd(made, message, 8192, 0o4000) == 0:
        pass
    return made
def name():
    try:
        os.close(os.open("/dev/shm/%d" % counts["name"], os.O_CREAT | os.O_WRONLY))
    except OSError:
        return -1
    return 0
counts = {"segment": 0, "queue": 0, "semaphores": 0, "name": 0}
makers = segment, queue, lambda: libc.semget(0, 250, 0o1600), name
for kind, make in zip(counts, makers):
    while counts[kind] < 20000 and make() >= 0:
        counts[kind] += 1
with open("/dev/shm/0", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(1 << 20))
    except OSError:
        pass
print(*counts.values())
"""


def running_since(worker: Worker) -> str:
    return docker("inspect", "-f", "{{.State.StartedAt}}", worker.name)


def test_a_renter_s_memory_without_a_process_kills_no_process_of_others(rental: Rental, roommate: Rental) -> None:
    """Without a limit, the kernel would kill all processes, the agent last, because no process has this memory."""
    before = rental.on.log().count("sshd ended"), running_since(rental.on)
    segments, queues, semaphores, names = map(int, rental.python(KEEP_MEMORY).split())
    assert (segments, queues, semaphores) == (4, 64, 128)
    assert names < 16384
    assert (rental.on.log().count("sshd ended"), running_since(rental.on)) == before
    assert roommate.accepts()
    assert roommate.ssh("touch /tmp/mine ~/mine; echo $((1 + 1))").stdout == "2\n"
    for command in ("freeze", "thaw"):
        status, report = rental.on.rental(command, rental_id=rental.rental_id, epoch=1)
        assert status == 0, report
    status, report = rental.on.rental("purge", **rental.variables)
    assert (status, report["left"]) == (0, []), report


FORK = r"""
import os, signal
for number in set(range(1, 65)) - {9, 19, 32, 33}:
    signal.signal(number, signal.SIG_IGN)
while True:
    try:
        if os.fork() and os.fork():
            os._exit(0)
        os.setsid()
    except OSError:
        pass
"""


def test_a_start_command_that_forks_for_ever_does_not_delay_the_orders_of_root(
    rental: Rental, roommate: Rental, folder: Path
) -> None:
    """Let it leave its session, ignore each signal and start anew at each order; no order may wait long for that."""
    assert rental.ssh("cat > fork.py", FORK).returncode == 0
    boot = rental.on.run("cat", "/run/orion/boot-id").strip()
    asked = {**rental.variables, "public_keys": [rental.key.public], "start": "exec setsid python3 fork.py"}

    def niceness() -> list[str]:
        return rental.on.run("ps", "-o", "ni=", "--user", str(rental.uid), check=False).split()

    for run in (1, 2):
        status, report = rental.on.rental("run", **asked, start_mark=f"{run}@{boot}")
        assert (status, "started" in report) == (0, True), report
        wait_until(lambda: niceness().count(str(LOWEST_PRIORITY)) > CROWD, "it has the lowest priority")
        assert roommate.accepts()
        for command in ("freeze", "thaw"):
            status, report = rental.on.rental(command, rental_id=rental.rental_id, epoch=1)
            assert status == 0, report
    activated = new_rental(rental.on, folder).create_quickly()
    assert activated.accepts()
    status, report = rental.on.rental("purge", **rental.variables)
    assert (status, report["left"]) == (0, []), report
    assert rental.traces() == ""
    assert activated.on.rental("purge", **activated.variables)[0] == 0
