"""Attacks of a renter on its worker: privileges, network, resources, persistence. test_worker_walls.py has more."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rental_support import Rental, new_rental
from worker_support import Key, SmallManager, Worker, WorkerNetwork, docker, wait_until, worker

TRY_TO = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, action):
    ctypes.set_errno(0)
    try:
        result = action()
        error = ctypes.get_errno() if result == -1 else 0
    except OSError as failure:
        error = failure.errno
    print(name, os.strerror(error) if error else "WORKED")
"""


@pytest.fixture(scope="module")
def rental(host: Worker, tmp_path_factory: pytest.TempPathFactory) -> Rental:
    return new_rental(host, tmp_path_factory.mktemp("keys")).create_quickly()


@pytest.fixture(scope="module")
def roommate(host: Worker, tmp_path_factory: pytest.TempPathFactory) -> Rental:
    """Another renter of the same worker."""
    return new_rental(host, tmp_path_factory.mktemp("keys")).create_quickly()


def outcomes(rental: Rental, attempts: str) -> dict[str, str]:
    printed = rental.python(TRY_TO + attempts)
    return dict(line.split(" ", 1) for line in printed.splitlines())


# Privileges


def test_a_renter_cannot_gain_kernel_privileges(rental: Rental) -> None:
    """Try name spaces, mounts, modules, devices, tracing and kernel memory."""
    found = outcomes(
        rental,
        """
attempt("user-namespace", lambda: libc.unshare(0x10000000))
attempt("mount-namespace", lambda: libc.unshare(0x00020000))
attempt("mount", lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
attempt("chroot", lambda: os.chroot("/tmp"))
attempt("setuid", lambda: os.setuid(0))
attempt("setgid", lambda: os.setgroups([0]))
attempt("chown", lambda: os.chown(os.path.expanduser("~"), 0, 0))
attempt("kill-root", lambda: os.kill(1, 9))
attempt("trace-root", lambda: libc.ptrace(16, 1, 0, 0))
attempt("raw-socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("raw-socket-6", lambda: socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58))
attempt("packet-socket-for-ARP", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0806))
attempt("network-namespace", lambda: libc.unshare(0x40000000))
attempt("device", lambda: os.mknod("/tmp/disk", 0o60666, os.makedev(254, 0)))
attempt("kernel-log", lambda: libc.syscall(103, 3, ctypes.create_string_buffer(64), 64))
attempt("memory", lambda: open("/dev/mem", "rb").fileno())
attempt("sysctl", lambda: open("/proc/sys/kernel/core_pattern", "w").fileno())
attempt("sysrq", lambda: open("/proc/sysrq-trigger", "w").fileno())
attempt("module", lambda: libc.syscall(175, b"x", 1, b""))
attempt("clock", lambda: libc.settimeofday(ctypes.create_string_buffer(16), None))
attempt("hostname", lambda: libc.sethostname(b"mine", 4))
attempt("swap", lambda: libc.swapon(b"/tmp/x", 0))
attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))
attempt("oom", lambda: open("/proc/self/oom_score_adj", "w").write("-500") and os.listdir("/proc/1/fd"))
attempt("cgroup", lambda: os.mkdir("/sys/fs/cgroup/mine"))
attempt("bpf", lambda: libc.syscall(321, 0, ctypes.create_string_buffer(64), 64))
attempt("perf", lambda: libc.syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0))
attempt("keys-of-the-kernel", lambda: libc.syscall(248, b"user", b"mine", b"x", 1, -4))
attempt("files-by-handle", lambda: libc.syscall(304, 0, ctypes.create_string_buffer(128), 0))
attempt("page-faults", lambda: libc.syscall(323, 0))
""",
    )
    assert len(found) == 30
    assert [name for name, became in found.items() if became == "WORKED"] == []


def test_a_renter_can_list_processes_of_others_but_not_inspect_them(rental: Rental, roommate: Rental) -> None:
    roommate.ssh("SECRET=hush-hush setsid sleep 120 >/dev/null 2>&1 </dev/null &")
    its = ("pgrep", "-u", str(roommate.uid), "-x", "sleep")
    pid = wait_until(lambda: rental.on.run(*its, check=False), "it sleeps").split()[0]
    for file in ("environ", "maps", "mem", "fd", "cwd", "root", "stack", "io"):
        assert "hush-hush" not in rental.ssh(f"cat /proc/{pid}/{file}; ls -l /proc/{pid}/{file}").stdout
        for victim in (pid, "1", rental.on.run("pgrep", "-x", "orion-agent").strip()):
            assert rental.ssh(f"head -c 1 /proc/{victim}/{file} || ls /proc/{victim}/{file}/").returncode != 0
    assert rental.ssh(f"kill -9 {pid}").returncode != 0
    everything = rental.ssh("cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null").stdout
    assert "orion_" not in everything.replace("/orion_worker/", "/"), "a token"


def test_shared_directories_keep_each_renters_files_its_own(rental: Rental, roommate: Rental) -> None:
    for place in ("/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108
        file = f"{place}/of-{roommate.uid}"
        assert roommate.ssh(f"umask 077; echo mine > {file}").returncode == 0
        tries = (
            f"cat {file}",
            f"rm -f {file}",
            f"mv {file} {file}.x",
            f"ln {file} ~/link-{roommate.uid}",
            f"echo x > {file}",
        )
        for command in tries:
            assert rental.ssh(command).returncode != 0, command
        assert roommate.ssh(f"cat {file} && rm {file}").stdout == "mine\n"


def test_a_renter_cannot_change_how_its_log_in_is_authorized(rental: Rental) -> None:
    for command in (
        "echo x >> /etc/passwd",
        "touch /etc/orion/keys/mine",
        "rm /etc/ssh/ssh_host_ed25519_key.pub",
        "touch /usr/local/sbin/x /usr/local/lib/orion/x /etc/cron.d/x /etc/profile.d/x /var/lib/orion/x /run/orion/x",
        "crontab -l; at now; systemctl start x; su -; sudo -n id; newgrp root",
    ):
        done = rental.ssh(f"({command}) 2>&1")
        assert done.returncode != 0, (command, done.stdout)
    home = 'mkdir -p ~/.ssh; echo "command=\\"id\\" ssh-ed25519 AAAA" > ~/.ssh/authorized_keys; echo exit 7 > ~/.ssh/rc'
    rental.ssh(f"{home}; echo LD_PRELOAD=/tmp/x > ~/.ssh/environment")
    assert rental.ssh("echo still in; echo $LD_PRELOAD").stdout == "still in\n\n"


# Network


@pytest.fixture
def machine() -> Iterator[tuple[str, int]]:
    """Yield a service of the platform's host, at an address outside of the platform's network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        address = probe.getsockname()[0]
    with socket.create_server((address, 0)) as service:
        yield address, service.getsockname()[1]


CONNECT = """
import socket
try: socket.create_connection(({address!r}, {port}), timeout=3).close(); print("open")
except OSError as error: print(error.strerror or "silent")
"""


LOCAL = (
    "10.255.255.1",
    "172.17.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "172.31.255.1",
    "192.0.0.8",
    "198.18.0.1",
    "0.0.0.1",
)


def test_a_renter_cannot_reach_the_network_around_its_worker(rental: Rental) -> None:
    for place in LOCAL:
        assert rental.python(CONNECT.format(address=place, port=80)).strip() == "No route to host", place


@pytest.mark.parametrize(
    ("egress", "is_told", "reaches"),
    [
        ("", False, ["open", "No route to host"]),
        ("", True, ["No route to host", "No route to host"]),
        ("none", False, ["No route to host", "No route to host"]),
        ("{machine},10.255.0.0/16", False, ["open", "tried"]),
        ("internet,10.255.0.0/16", True, ["No route to host", "tried"]),
        ("{machine},10.255.0.0/16", True, ["No route to host", "tried"]),
        ("internet,!{machine}", False, ["No route to host", "No route to host"]),
    ],
)
def test_a_renter_reaches_the_permitted_egress_and_never_the_configured_host_addresses(
    network: WorkerNetwork, shared_manager: SmallManager, join: Path, folder: Path, machine: tuple[str, int],
    egress: str, is_told: bool, reaches: list[str],
) -> None:  # fmt: skip
    address, port = machine
    given = {"ORION_EGRESS": egress.format(machine=address), "ORION_HOST_ADDRESSES": address if is_told else ""}
    options = [part for name, value in given.items() for part in ("--env", f"{name}={value}")]
    with worker(network, shared_manager, join, *options) as made:
        made.wait_registered()
        renter = new_rental(made, folder).create_quickly()
        found = [renter.python(CONNECT.format(address=place, port=port)).strip() for place in (address, "10.255.255.1")]
        assert [each if each in {"open", "No route to host"} else "tried" for each in found] == reaches
        assert made.run("python3", "-c", CONNECT.format(address=address, port=port)).strip() == "open", (
            "root still reaches it"
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [("ORION_EGRESS", each) for each in ("everything", "1.2.3", "cafe.de", "1.2.3.4/33", "!")]
    + [("ORION_HOST_ADDRESSES", "example.org")],
)
def test_a_worker_with_an_invalid_egress_setting_does_not_start(
    network: WorkerNetwork, shared_manager: SmallManager, join: Path, name: str, value: str
) -> None:
    with worker(network, shared_manager, join, "--env", f"{name}={value}") as made:
        wait_until(lambda: docker("inspect", "-f", "{{.State.Status}}", made.name).strip() == "exited", "it ends")
        assert name in made.log() or "packet filter could not be set" in made.log()


def test_a_renter_s_loopback_offers_only_the_name_server(rental: Rental, neighbour: Worker) -> None:
    """Check a renter's own loopback, where only Docker's name server listens."""
    listening = rental.ssh("cat /proc/net/tcp /proc/net/tcp6").stdout
    assert rental.python(CONNECT.format(address="127.0.0.11", port=22)).strip() != "open"
    assert listening


# Resources


def test_a_renter_that_uses_all_memory_loses_only_its_own_processes(rental: Rental, roommate: Rental) -> None:
    started = docker("inspect", "-f", "{{.State.StartedAt}}", rental.on.name)
    hog = "held = []\nwhile True: held.append(bytearray(16 << 20))"
    with ThreadPoolExecutor(3) as pool:
        hogs = [pool.submit(rental.ssh, "python3 -", hog) for _ in range(3)]
        began = time.monotonic()
        assert roommate.accepts()
        assert rental.on.ssh("root", rental.on.key, "echo in").stdout == "in\n"
        assert time.monotonic() - began < 40
        assert all(each.result().returncode != 0 for each in hogs)
    assert docker("inspect", "-f", "{{.State.StartedAt}}", rental.on.name) == started
    before = time.monotonic()
    wait_until(lambda: rental.on.manager.of("/api/heartbeat", before), "heartbeats continue")


LOWER = """
import glob
lowered = []
for file in ["/proc/self/oom_adj", *glob.glob("/proc/[0-9]*/oom_score_adj")]:
    try:
        with open(file, "w") as score:
            score.write("1" if file.endswith("oom_adj") else "499")
        lowered.append(file)
    except OSError:
        pass
print(lowered, open("/proc/self/oom_score_adj").read().strip())
"""
NOTHING_LOWERED = {f"[] {score}\n" for score in (500, 1000)}


def test_a_renter_cannot_lower_the_oom_score_of_its_processes(rental: Rental, folder: Path) -> None:
    """Try it in a session, by the settings that sshd applies for a renter, and in a start command."""
    if "a renter can have the kernel end others before itself" in rental.on.log():
        pytest.skip("the kernel (older than 5.19) or the engine has no Landlock: runs where both have it")
    lasting = rental.ssh("setsid sleep 600 >/dev/null 2>&1 </dev/null & echo $!").stdout.strip()
    assert rental.python(LOWER) in NOTHING_LOWERED
    (folder / "score").write_text("499")
    sftp = ["sftp", "-q", "-b", "-", *rental.on.ssh_command(rental.username, rental.key)[1:]]
    batch = f"put {folder}/score /proc/{lasting}/oom_score_adj"
    done = subprocess.run(sftp, input=batch, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "Permission denied" in done.stderr
    assert rental.ssh(f"cat /proc/{lasting}/oom_score_adj").stdout.strip() in {"500", "1000"}
    rental.ssh("cat > lower.py", LOWER)
    boot = rental.on.run("cat", "/run/orion/boot-id").strip()
    start = {"start": "python3 lower.py > lowered.new; mv lowered.new lowered", "start_mark": f"1@{boot}"}
    status, report = rental.on.rental("run", **rental.variables, public_keys=[rental.key.public], **start)
    assert (status, report.get("started")) == (0, True), report
    assert wait_until(lambda: rental.ssh("cat lowered").stdout, "it has tried") in NOTHING_LOWERED


MANY_SMALL = """
import os, time
for _ in range(14):
    if os.fork() == 0:
        try:
            open("/proc/self/oom_score_adj", "w").write("0")
        except OSError:
            pass
        held = b"x" * (36 << 20)
        time.sleep(300)
        os._exit(0)
    time.sleep(0.15)
time.sleep(3)
"""
ONE_LARGE = """
import os, time
held = b"x" * (80 << 20)
print(os.getpid(), flush=True)
time.sleep(300)
"""


def test_the_oom_killer_takes_many_small_processes_of_one_renter_before_a_neighbour_s_large_one(
    rental: Rental, roommate: Rental
) -> None:
    """Let them need more memory than there is: only they may be killed, and no process of a neighbour or of root."""

    def session(user: str, key: Key, command: str) -> subprocess.Popen[str]:
        with_it = [*rental.on.ssh_command(user, key), command]
        return subprocess.Popen(with_it, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    deaths = rental.on.log().count("sshd ended")

    def attackers() -> int:
        return len(rental.on.run("pgrep", "-u", str(rental.uid), "-x", "python3", check=False).split())

    with (
        session(roommate.username, roommate.key, "python3 -u -") as neighbour,
        session("root", rental.on.key, "echo in; exec sleep 300") as of_root,
    ):
        assert neighbour.stdin is not None
        assert neighbour.stdout is not None
        assert of_root.stdout is not None
        try:
            neighbour.stdin.write(ONE_LARGE)
            neighbour.stdin.close()
            assert int(neighbour.stdout.readline())
            assert of_root.stdout.readline() == "in\n"
            rental.ssh("python3 - >/dev/null 2>&1", MANY_SMALL)
            wait_until(lambda: attackers() < 14, "the kernel has ended some")
            assert (neighbour.poll(), of_root.poll()) == (None, None)
            assert rental.on.log().count("sshd ended") == deaths
            assert roommate.accepts()
        finally:
            rental.on.run("pkill", "-9", "-u", str(rental.uid), check=False)
            neighbour.kill()
            of_root.kill()


def test_a_fork_bomb_does_not_block_other_renters(rental: Rental, roommate: Rental) -> None:
    bomb = "import os, sys\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    bombing = subprocess.Popen(
        [*rental.on.ssh_command(rental.username, rental.key), "timeout 8 python3 -"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert bombing.stdin
    bombing.stdin.write(bomb)
    bombing.stdin.close()
    wait_until(lambda: len(rental.on.run("pgrep", "-u", str(rental.uid), check=False).split()) > 30, "it goes off")
    assert roommate.accepts()
    before = time.monotonic()
    wait_until(lambda: rental.on.manager.of("/api/heartbeat", before), "heartbeats continue")
    status, report = rental.on.rental("lock", rental_id=rental.rental_id, epoch=1, kill=True)
    assert (status, report["state"]) == (0, "locked")
    assert rental.on.run("pgrep", "-u", str(rental.uid), check=False) == ""
    rental.on.rental("unlock", rental_id=rental.rental_id, epoch=1)
    bombing.kill()
    bombing.wait()
    assert rental.accepts()


def test_limits_of_open_files_watches_and_sessions_count_for_each_renter(rental: Rental, roommate: Rental) -> None:
    greedy = """
import ctypes, os, socket
libc = ctypes.CDLL(None)
held = []
try:
    while True: held.append(os.open("/", 0))
except OSError as error: print(error.strerror)
os.close(held.pop())
while libc.inotify_init() >= 0: pass
"""
    assert rental.python(greedy) == "Too many open files\n"
    idle = [rental.log_in("sleep 60") for _ in range(40)]
    try:
        wait_until(
            lambda: (
                len(rental.on.run("pgrep", "-u", str(rental.uid), "-x", "sleep", check=False).split())
                + sum(session.poll() is not None for session in idle)
                == len(idle)
            ),
            "each session is in, or refused by the limit of its renter's processes",
            within_s=60,
        )
        assert roommate.accepts()
        assert rental.on.ssh("root", rental.on.key, "echo in").stdout == "in\n"
    finally:
        for session in idle:
            session.kill()
        for session in idle:
            session.wait()


@pytest.fixture
def small(network: WorkerNetwork, shared_manager: SmallManager, join: Path) -> Iterator[Worker]:
    """Yield a worker whose homes are on a disk of 16 MB."""
    with worker(network, shared_manager, join, "--tmpfs=/home:mode=0755,size=16m", slots=2) as made:
        made.wait_registered()
        yield made


def test_a_renter_that_fills_the_disk_blocks_no_other_and_its_release_frees_the_disk(
    small: Worker, folder: Path
) -> None:
    full, other = (new_rental(small, folder).create_quickly() for _ in range(2))
    done = full.ssh("dd if=/dev/zero of=fill bs=1M; i=0; while echo > name-$i; do i=$((i+1)); done")
    assert "No space left" in done.stderr
    assert other.accepts()
    before = time.monotonic()
    wait_until(lambda: small.manager.of("/api/heartbeat", before), "heartbeats continue")
    status, report = small.rental("purge", **full.variables)
    assert (status, report["left"]) == (0, []), report
    assert other.ssh("dd if=/dev/zero of=room bs=1M count=8").returncode == 0


# Persistence


STAYS = r"""
import os
home = os.path.expanduser("~").encode()
names = (b"\xff\xfe", b"new\nline", b"-rf", b" ", b"\x1b[2J", b"a" * 255, b"*", b"'", b'"$(id)"', b"\\", b"{{ 7 }}")
for name in names:
    os.mkdir(home + b"/" + name, 0o000)
    open(b"/tmp/" + name, "w").close()
os.mkdir(home + b"/many")
for number in range(60000):
    os.link(home + b"/many/0", home + b"/many/%d" % number) if number else open(home + b"/many/0", "w").close()
os.truncate(home + b"/many/0", 1 << 40)
os.chmod(home + b"/many", 0)
os.chmod(home, 0)
"""


def test_a_release_removes_many_files_with_strange_names(rental: Rental) -> None:
    leaving = new_rental(rental.on, rental.key.file.parent).create_quickly()
    leaving.python(STAYS)
    played = leaving.delete()
    assert played.ok, played.output
    assert leaving.traces() == ""


UNREMOVABLE = """
import fcntl
here = os.path.expanduser("~/here")
open(here, "w").close()
file = os.open(here, os.O_RDONLY)
for name, flag in (("immutable", 0x10), ("append-only", 0x20)):
    attempt(name, lambda: fcntl.ioctl(file, 0x40086602, struct.pack("L", flag)))
attempt("mount-over", lambda: libc.mount(b"/tmp", here.encode(), None, 4096, None))
attempt("at", lambda: os.open("/var/spool/cron/atjobs/mine", os.O_CREAT | os.O_WRONLY))
attempt("cron", lambda: os.open("/var/spool/cron/crontabs/mine", os.O_CREAT | os.O_WRONLY))
attempt("timer", lambda: os.open("/etc/systemd/system/mine.timer", os.O_CREAT | os.O_WRONLY))
attempt("linger", lambda: os.open("/var/lib/systemd/linger/mine", os.O_CREAT | os.O_WRONLY))
attempt("group-of-another", lambda: os.chown(here, -1, 0))
"""


def test_a_purge_removes_everything_that_a_renter_can_make(rental: Rental) -> None:
    """Try immutable names, mounts, and files that would start a program again."""
    found = outcomes(rental, "import struct\n" + UNREMOVABLE)
    assert len(found) == 8
    assert [name for name, became in found.items() if became == "WORKED"] == []


def test_a_purge_follows_no_link_to_a_neighbour_s_file(rental: Rental, roommate: Rental) -> None:
    """Make hard and symbolic links: a purge that followed one would remove another rental's file."""
    assert roommate.ssh("chmod 711 .; echo mine > open; chmod 666 open; mkdir -m 777 shared").returncode == 0
    leaving = new_rental(rental.on, rental.key.file.parent).create_quickly()
    there = f"/home/{roommate.username}"
    leaving.ssh(
        f"ln {there}/open hard; ln -s {there}/open soft; ln -s {there}/shared dir; ln -s / root; ln -s /etc etc"
    )
    leaving.ssh(f"echo theirs > {there}/shared/left-there")
    status, report = rental.on.rental("purge", **leaving.variables)
    assert (status, report["left"]) == (0, []), report
    assert roommate.ssh("cat open; ls shared").stdout == "mine\n"
    assert leaving.traces() == ""
