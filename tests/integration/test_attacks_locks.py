"""Attacks of a renter that locks, names or replaces the files that root opens, locks and follows on a worker."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rental_support import Rental, new_rental
from snapshot_support import home_of, snapshot_service
from test_identity import activate
from worker_support import ROOT, SmallManager, Worker, WorkerNetwork, worker

from orion.manager.domain.snapshot_plan import SnapshotLimits

LIMITS = SnapshotLimits(max_files=20_000, max_bytes=64 << 20)

LIBRARY = "/usr/local/lib/orion"
NOTED = "/run/orion-noted"
SHARED = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock")  # noqa: S108
ANYBODYS = ("/dev/null", *SHARED)
NOTE = f'''
import os, sys
def note(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or "/lib/python3" in os.fsdecode(path) or path == "{NOTED}":
            return
        kinds = ["open"]
        if not flags & os.O_NOFOLLOW:
            kinds.append("follow")
        if not flags & (os.O_NONBLOCK | os.O_DIRECTORY | os.O_PATH | os.O_EXCL):
            kinds.append("wait")
        what = ",".join(kinds), os.fsdecode(path)
    elif event in ("fcntl.flock", "fcntl.lockf"):
        number = arguments[0]
        what = "lock", os.readlink(f"/proc/self/fd/{{number}}")
    elif event == "socket.bind":
        what = "bind", str(arguments[1])
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.chown", "os.chmod", "os.listdir"):
        what = "name", str(arguments[0])
    else:
        return
    noted.append(what)
    if len(noted) == 1:
        descriptor = posix.open("{NOTED}", os.O_WRONLY | os.O_APPEND)
        while noted:
            os.write(descriptor, ("\\t".join(map(str, noted.pop())) + "\\n").encode(errors="replace"))
        os.close(descriptor)
noted = []
import posix
sys.addaudithook(note)
'''
HOLD = """
import fcntl, os, sys, time
WAYS = (
    lambda descriptor: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB),
    lambda descriptor: fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB),
    lambda descriptor: fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB),
    lambda descriptor: fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK),
)
def hold(place):
    for flags in (os.O_RDWR, os.O_RDONLY):
        try:
            descriptor = os.open(place, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            continue
        for way in WAYS:
            try:
                way(descriptor)
            except OSError:
                pass
        return print(place)
for guess in sys.argv[1:]:
    hold(guess)
for top, folders, files in os.walk("/"):
    folders[:] = [each for each in folders if os.path.join(top, each) not in ("/proc", "/sys", "/usr", "/dev")]
    for name in (".", *files):
        hold(os.path.join(top, name))
print("all", flush=True)
time.sleep(300)
"""
REACH = """
import os, sys
for place in sys.stdin.read().split("\\n"):
    for right, name in ((os.R_OK, "read"), (os.W_OK, "write")):
        if place and os.access(place, right):
            print(name, place)
    if place and os.access(os.path.dirname(place), os.W_OK):
        print("replace", place)
"""


@dataclass
class Observed:
    """A worker that records the files that programs of root open, lock and name."""

    on: Worker

    def noted(self, *kinds: str) -> list[str]:
        lines = [line.split("\t", 1) for line in self.on.run("cat", NOTED).splitlines() if "\t" in line]
        return sorted({path for kind, path in lines if {*kind.split(",")} & {*kinds}})


@pytest.fixture(scope="module")
def observed(
    network: WorkerNetwork, shared_manager: SmallManager, join: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observed]:
    place = tmp_path_factory.mktemp("noting")
    (place / "noting.py").write_text(NOTE)
    (place / "records.py").write_text(f"{(ROOT / 'worker/orion_worker/records.py').read_text()}\nimport noting\n")
    (place / "noted").write_text("")
    (place / "noted").chmod(0o666)
    mounted = {"noting.py": LIBRARY, "records.py": f"{LIBRARY}/orion_worker"}
    mounts = [f"--volume={place}/{name}:{folder}/{name}:ro" for name, folder in mounted.items()]
    with worker(network, shared_manager, join, *mounts, f"--volume={place}/noted:{NOTED}", slots=4) as made:
        made.wait_registered()
        yield Observed(made)


def live(rental: Rental, folder: Path) -> None:
    """Do all that is done to a rental, from its begin to its end; raise where anything of that is refused or late."""
    on, named = rental.on, {"rental_id": rental.rental_id, "epoch": 1}
    activate(rental)
    assert rental.accepts()
    assert rental.ssh("mkdir -p deep/er; echo text > deep/er/file; ln -s /etc/passwd link").returncode == 0
    again = replace(rental, epoch=2)
    with snapshot_service(folder, on.key) as real:
        asyncio.run(real.client.take(home_of(rental), LIMITS))
        for command in ("freeze", "thaw", "lock", "unlock"):
            status, report = on.rental(command, **named)
            assert status == 0, (command, report)
        assert rental.accepts()
        asyncio.run(real.client.recover(home_of(rental), LIMITS))
        status, report = on.rental("purge", **rental.variables)
        assert (status, report["left"]) == (0, []), report
        status, report = on.rental("create", **again.variables, public_keys=[rental.key.public])
        assert status == 0, report
        assert asyncio.run(real.client.restore(home_of(again)))
        status, report = on.rental("unlock", rental_id=rental.rental_id, epoch=2)
        assert status == 0, report
    assert again.ssh("cat deep/er/file").stdout == "text\n"
    status, report = on.rental("purge", **again.variables)
    assert (status, report["left"]) == (0, []), report


@contextmanager
def locked_by(attacker: Rental, *guesses: str) -> Iterator[list[str]]:
    """Have a renter lock and lease all that it can open, until this ends; give the files and directories."""
    command = attacker.on.ssh_command(attacker.username, attacker.key)
    program = shlex.join(["python3", "-c", HOLD, *guesses])
    with subprocess.Popen([*command, program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as holding:
        assert holding.stdout is not None
        try:
            places = list(iter(lambda: holding.stdout.readline().rstrip("\n"), "all"))
            assert len(places) > 100, "it locks all files that every user may read"
            yield places
            assert holding.poll() is None, "it kept the locks all the time"
        finally:
            holding.kill()


def test_a_renter_that_locks_all_files_that_it_can_open_delays_no_other(observed: Observed, folder: Path) -> None:
    attacker, victim = (new_rental(observed.on, folder) for _ in range(2))
    activate(attacker)
    live(replace(victim, rental_id=victim.rental_id[::-1], uid=victim.uid + 1000), folder)
    locked = observed.noted("lock")
    assert {"/run/orion/sshd.lock", "/run/orion/freezing.lock", "/etc/.pwd.lock"} <= set(locked)
    there = (f"/var/lib/orion-aside/.{victim.rental_id}", f"/var/lib/orion/rentals/locks/{victim.rental_id}")
    with locked_by(attacker, *locked, *there) as places:
        assert not set(places) & set(locked)
        live(victim, folder)
    status, report = observed.on.rental("purge", **attacker.variables)
    assert (status, report["left"]) == (0, []), report


def test_a_renter_cannot_reach_files_that_root_locks_opens_or_names(observed: Observed, folder: Path) -> None:
    attacker, victim = (new_rental(observed.on, folder) for _ in range(2))
    activate(attacker)
    live(victim, folder)

    def reached(*kinds: str) -> list[str]:
        """Return the operations that the renter may do on files of these kinds: read, write or replace."""
        own = (*ANYBODYS, f"/home/{attacker.username}", "/proc/self/oom_score_adj")
        places = [each for each in observed.noted(*kinds) if each.startswith("/") and each not in own]
        assert len(places) > 1, "something is looked at"
        done = attacker.ssh(f"python3 -c {shlex.quote(REACH)}", "\n".join(places))
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    assert reached("lock", "bind") == []
    assert [each for each in reached("open", "follow", "name") if not each.startswith("read ")] == []
    status, report = observed.on.rental("purge", **attacker.variables)
    assert (status, report["left"]) == (0, []), report


def test_root_opens_files_in_a_home_without_following_links_or_waiting(observed: Observed, folder: Path) -> None:
    live(new_rental(observed.on, folder), folder)
    places = observed.noted("follow", "wait")
    below = [each for each in places if not each.startswith("/") or each.startswith(("/home/", *SHARED))]
    assert below == [], "a link leads root away, and a pipe or a lease keeps it waiting"
    assert {"deep", "file"} <= set(observed.noted("open")), "opened beside an open directory, by name"


FILL = """
import os, time
while True:
    try:
        if os.fork() == 0:
            time.sleep(300)
            os._exit(0)
    except OSError:
        print("full", flush=True)
        break
"""


def test_a_renter_that_locks_all_files_and_fills_its_processes_is_still_migrated_and_released(
    network: WorkerNetwork, shared_manager: SmallManager, join: Path, folder: Path
) -> None:
    """Freeze, snapshot, recover and purge the attacker's own rental on a worker of one slot."""
    with worker(network, shared_manager, join, slots=1) as on, snapshot_service(folder, shared_manager.key) as real:
        on.wait_registered()
        attacker = new_rental(on, folder)
        activate(attacker)
        assert attacker.ssh("mkdir -p deep; echo text > deep/file").returncode == 0
        command = shlex.join(["python3", "-c", FILL + HOLD])
        holding = subprocess.Popen(
            [*on.ssh_command(attacker.username, attacker.key), f"exec {command}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert holding.stdout is not None
        try:
            assert holding.stdout.readline() == "full\n"
            places = list(iter(lambda: holding.stdout.readline().rstrip("\n"), "all"))  # type: ignore[union-attr]
            assert f"/home/{attacker.username}/deep/file" in places
            for order in ("freeze", "thaw", "lock", "unlock"):
                asyncio.run(real.client.take(home_of(attacker), LIMITS))
                status, report = on.rental(order, rental_id=attacker.rental_id, epoch=1)
                assert status == 0, (order, report)
            assert asyncio.run(real.client.recover(home_of(attacker), LIMITS)).snapshot.files >= 1
            status, report = on.rental("purge", **attacker.variables)
            assert (status, report["left"]) == (0, []), report
            assert attacker.traces() == ""
        finally:
            holding.kill()
            holding.wait()
