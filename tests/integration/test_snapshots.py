"""Snapshots and restores of homes on real workers, by the real snapshot service, ssh and rsync.

The renters here play every trick on it that a renter can; a worker that lies is in test_snapshots_attacks.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from orion_worker.rpc.server import SOCKET_PATH
from rental_support import Rental, new_rental, placement
from snapshot_service_contract import SnapshotBench, SnapshotServiceContract, refusal
from snapshot_support import RealSnapshotService, home_of, host_of, snapshot_service
from worker_support import Worker, wait_until

from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import Snapshot
from orion.manager.snapshots.disk import Disk
from orion.manager.snapshots.port import ALREADY_ACTIVATED, Home, SnapshotError

LIMITS = SnapshotLimits(max_files=20_000, max_bytes=64 << 20)


@pytest.fixture(scope="module")
def real(pair: tuple[Worker, Worker], folder: Path) -> Iterator[RealSnapshotService]:
    with snapshot_service(folder, pair[0].key) as running:
        yield running


class RealSnapshotBench(SnapshotBench):
    def __init__(self, real: RealSnapshotService, pair: tuple[Worker, Worker], folder: Path) -> None:
        self._disk = Disk.of(real.copies)
        self.snapshot_service = real.client
        self.hosts = (host_of(pair[0]), host_of(pair[1]))
        self._workers = dict(zip(self.hosts, pair, strict=True))
        self._key = pair[0].key.public
        self._offset = 1000 * secrets.randbelow(10_000)

    def new_home(self, epoch: int = 1) -> Home:
        home = super().new_home(epoch)
        return replace(home, uid=home.uid + self._offset)

    @property
    def disk_bytes(self) -> int:
        return self._disk.size.bytes

    async def create(self, home: Home, activated: bool) -> None:
        worker = self._workers[home.host]
        request = {"rental_id": home.rental_id, "username": f"r-{home.rental_id}", "uid": home.uid}
        await _rental(worker, "create", **request, epoch=home.epoch, public_keys=[self._key])
        if activated:
            await _rental(worker, "unlock", rental_id=home.rental_id, epoch=home.epoch)

    async def write(self, home: Home, name: str, content: str) -> None:
        await self._in(home, f"printf %s '{content}' > {name}")

    async def remove(self, home: Home, name: str) -> None:
        await self._in(home, f"rm {name}")

    async def files(self, home: Home) -> dict[str, str]:
        script = "import json, os; print(json.dumps({n: open(n).read() for n in os.listdir('.')}))"
        files: dict[str, str] = json.loads(await self._in(home, f'python3 -c "{script}"'))
        return files

    async def _in(self, home: Home, script: str) -> str:
        become = ["setpriv", f"--reuid={home.uid}", f"--regid={home.uid}", "--clear-groups"]
        command = [*become, "sh", "-c", f"cd /home/r-{home.rental_id} && {script}"]
        return await asyncio.to_thread(self._workers[home.host].run, *command)


async def _rental(worker: Worker, command: str, **request: Any) -> None:
    status, report = await asyncio.to_thread(lambda: worker.rental(command, **request))
    assert status == 0, report


@pytest.fixture
def bench(real: RealSnapshotService, pair: tuple[Worker, Worker], folder: Path) -> RealSnapshotBench:
    return RealSnapshotBench(real, pair, folder)


class TestRealVault(SnapshotServiceContract):
    pass


# Contents of a home


FURNISH = r"""
import os, socket
os.chdir(os.path.expanduser("~"))
def put(name, content=b"x", mode=0o644):
    with open(name, "wb") as file:
        file.write(content)
    os.chmod(name, mode)
os.mkdir("folder")
for name in (b"new\nline", b"'quotes\" $(id)`", b"\xff\xfe", b" space ", b"-rf", b"*", b"\x1b[2J", b"\\", b"a" * 255):
    put(b"folder/" + name, name)
put("small", b"content")
os.link("small", "folder/hard link")
os.symlink("/etc/shadow", "to-shadow")
os.symlink("/etc", "to-etc")
os.symlink("nowhere", "dangling")
os.setxattr("small", "user.mine", b"\x00value")
os.utime("small", ns=(1_000_000_000_123_456_789, 1_000_000_000_123_456_789))
os.symlink("x", "dated link")
os.utime("dated link", ns=(5, 1_100_000_000_000_000_007), follow_symlinks=False)
with open("sparse", "wb") as file:
    file.seek(30 << 20)
    file.write(b"end")
for mode in (0o400, 0o600, 0o755, 0o1777, 0o2755, 0o4755, 0o6777, 0o444):
    put("mode-%o" % mode, b"m", mode)
for mode in (0o500, 0o700, 0o1777, 0o2775):
    os.mkdir("folder-%o" % mode)
    put("folder-%o/inside" % mode)
    os.chmod("folder-%o" % mode, mode)
os.utime("folder", ns=(1_200_000_000_000_000_000, 1_200_000_000_000_000_000))
os.mkfifo("fifo")
socket.socket(socket.AF_UNIX).bind("socket")
put("unreadable", b"secret", 0)
os.mkdir("closed")
put("closed/inside")
os.chmod("closed", 0)
os.chmod(".", 0o711)
"""

LISTING = r"""
import hashlib, json, os, stat
os.chdir(os.path.expanduser("~"))
entries = {}
def describe(path):
    status = os.lstat(path)
    kind = stat.S_IFMT(status.st_mode)
    about = {"kind": kind, "mode": stat.S_IMODE(status.st_mode), "mtime": status.st_mtime_ns}
    about |= {"uid": status.st_uid, "gid": status.st_gid}
    if stat.S_ISLNK(kind):
        about["to"] = os.fsdecode(os.readlink(path))
    elif stat.S_ISREG(kind):
        about |= {"size": status.st_size, "links": status.st_nlink, "few blocks": status.st_blocks < 1000}
        about["xattr"] = {name: os.getxattr(path, name).hex() for name in os.listxattr(path)}
        if status.st_mode & 0o400:
            about["content"] = hashlib.sha256(open(path, "rb").read()).hexdigest()
    elif stat.S_ISDIR(kind) and status.st_mode & 0o400:
        for name in sorted(os.listdir(path)):
            describe(os.path.join(path, name))
    entries[os.fsdecode(path).encode("utf-8", "surrogateescape").hex()] = about
describe(b".")
print(json.dumps(entries))
"""


def listing(rental: Rental) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rental.python(LISTING))
    return {bytes.fromhex(name).decode(errors="backslashreplace"): about for name, about in found.items()}


async def migrate(real: RealSnapshotService, rental: Rental, to: Worker) -> Rental:
    """Migrate a rental to another worker at the next epoch, and activate it there."""
    migrated = replace(rental, on=to, epoch=rental.epoch + 1)
    await _rental(to, "create", **migrated.variables, public_keys=[migrated.key.public])
    assert await real.client.restore(home_of(migrated))
    await _rental(to, "unlock", rental_id=migrated.rental_id, epoch=migrated.epoch)
    return migrated


@pytest.fixture
def rental(host: Worker, folder: Path) -> Rental:
    return new_rental(host, folder).create_quickly()


async def test_a_restored_home_equals_the_original(
    real: RealSnapshotService, rental: Rental, neighbour: Worker
) -> None:
    rental.python(FURNISH)
    rental.ssh("touch -hd '2010-01-01 00:00:00.1' folder 'dated link'")
    await real.client.take(home_of(rental), LIMITS)
    rental.ssh("touch -hd '2010-01-01 00:00:00.2' folder 'dated link'")
    before = listing(rental)
    copied = await real.client.take(home_of(rental), LIMITS)
    assert copied.snapshot.skipped == ()
    after = listing(await migrate(real, rental, neighbour))
    assert after.keys() == before.keys()
    for name, about in after.items():
        assert about == before[name], name


async def test_old_snapshots_set_aside_in_the_final_sync_are_removed_after_the_restore(
    real: RealSnapshotService, rental: Rental, neighbour: Worker
) -> None:
    for number in range(3):
        rental.ssh(f"echo {number} > file")
        await real.client.take(home_of(rental), LIMITS)
    there = replace(rental, on=neighbour, epoch=2)
    await _rental(neighbour, "create", **there.variables, public_keys=[there.key.public])
    await real.client.restore(home_of(there), precopy=True)
    rental.ssh("echo last > file")
    await real.client.take(home_of(rental), LIMITS, for_migration=True)
    place = real.copies / rental.rental_id
    assert {each.name for each in place.iterdir()} == {"old-1-1", "1-2", "1-3", "1-4"}
    there = await migrate(real, rental, neighbour)
    assert there.ssh("cat file").stdout == "last\n"
    wait_until(lambda: not list(place.glob("old-*")), "it is removed once no call waits")


async def test_a_snapshot_holds_ten_thousand_files_and_an_unchanged_home_gets_no_new_snapshot(
    real: RealSnapshotService, rental: Rental
) -> None:
    rental.ssh("mkdir many; cd many; seq 10000 | xargs touch")
    first = (await real.client.take(home_of(rental), LIMITS)).snapshot
    assert first.files == 10_002
    again = (await real.client.take(home_of(rental), LIMITS)).snapshot
    assert again.id == first.id


async def test_a_snapshot_of_a_changing_home_succeeds_and_contains_no_files_of_others(
    real: RealSnapshotService, rental: Rental
) -> None:
    """Let files grow, and links replace files and directories, as fast as the renter can."""
    rental.ssh(
        "mkdir swap away; echo mine > swap/shadow; echo mine > file; head -c 3000000 /dev/zero > grows; "
        "(while :; do ln -sfT /etc/shadow file; rm -f file; echo mine > file; done) >/dev/null 2>&1 & "
        "(while :; do mv swap away/; ln -s /etc swap; rm swap; mv away/swap .; done) >/dev/null 2>&1 & "
        "(while :; do for _ in $(seq 500); do head -c 100000 /dev/zero >> grows; done; : > grows; done) "
        ">/dev/null 2>&1 & true"
    )
    secret = rental.on.run("cat", "/etc/shadow")
    for _ in range(4):
        copy = (await real.client.take(home_of(rental), SnapshotLimits(max_files=20_000, max_bytes=1 << 30))).snapshot
        place = real.copy_of(home_of(rental), str(copy.id))
        content = {f.read_text() for f in (place / "file", place / "swap/shadow", place / "swap") if f.is_file()}
        assert content <= {"mine\n", "", "/etc/shadow", "/etc"}, "a link is kept as a file with where it leads"
        assert secret not in content
    rental.ssh("kill -9 -1")


STAT = "user.rsync.%stat"
SPOILED = {
    "a folder": "40755 0,0 0:0",
    "a link": "120777 0,0 0:0",
    "a device": "60666 8,0 0:0",
    "root's": "104755 0,0 0:0",
    "another's": "100644 0,0 900:902",
    "sub": "120777 0,0 0:0",
}
"""Owners and modes of files that a compromised worker may have put into a snapshot, as rsync stores them."""


async def test_a_restore_gives_all_files_to_the_renter_whatever_owner_the_snapshot_names(
    real: RealSnapshotService, rental: Rental, neighbour: Worker
) -> None:
    rental.python("import os\nos.chdir(os.path.expanduser('~'))\nos.mkdir('sub')\nopen('sub/inside', 'w').write('x')")
    for name in SPOILED.keys() - {"sub"}:
        rental.ssh(f'printf /etc > "{name}"')
    rental.ssh("echo precious > honest")
    copied = (await real.client.take(home_of(rental), LIMITS)).snapshot
    place = real.copy_of(home_of(rental), str(copied.id))
    for name, stored in SPOILED.items():
        os.setxattr(place / name, STAT, stored.encode())
    there = replace(rental, on=neighbour, epoch=2)
    await _rental(neighbour, "create", **there.variables, public_keys=[there.key.public])
    before = neighbour.run("sh", "-c", "ls -la /etc | sha256sum")
    filled = await real.client.restore(home_of(there))
    assert filled
    wrong = f"find /home/{there.username} '(' ! -uid {there.uid} -o -type b -o -type c ')'"
    assert neighbour.run("sh", "-c", wrong) == ""
    assert neighbour.run("sh", "-c", "ls -la /etc | sha256sum") == before
    assert neighbour.run("cat", f"/home/{there.username}/honest") == "precious\n"


LONG_NAMES = r"""
import os
os.chdir(os.path.expanduser("~"))
letters = "\N{CYRILLIC SMALL LETTER ZHE}" * 127
os.mkdir(letters)
for number in range(30):
    name = f"{letters}/{number:02}{letters[2:]}"
    open(name, "w").close()
    os.setxattr(name, "user.rsync.%mine", b"reserved")
"""
"""Names that are as long as can be, of files that are carried in part."""
MANY_SHUT = r"""
import itertools, os, string
os.chdir(os.path.expanduser("~"))
for name in itertools.islice(itertools.product(string.ascii_letters, repeat=2), 990):
    os.mkdir("".join(name))
    os.chmod("".join(name), 0o300)
"""
"""The most directories whose modes the manager receives, with the shortest names."""


@pytest.mark.parametrize("furnish", [LONG_NAMES, MANY_SHUT], ids=["long names", "many modes"])
async def test_a_home_with_unusual_entries_is_still_in_snapshots_and_restored(
    real: RealSnapshotService, rental: Rental, neighbour: Worker, furnish: str
) -> None:
    rental.python(furnish)
    before = rental.ssh("stat -c '%A %n' *").stdout
    copied = (await real.client.take(home_of(rental), LIMITS)).snapshot
    assert len(copied.skipped) == (20 if furnish is LONG_NAMES else 0)
    there = await migrate(real, rental, neighbour)
    assert there.ssh("stat -c '%A %n' *").stdout == before


async def test_a_restore_that_begins_before_the_account_exists_completes_once_it_exists(
    bench: RealSnapshotBench,
) -> None:
    home = bench.new_home()
    await bench.create(home, activated=True)
    await bench.write(home, "file", "precious")
    copied = await bench.snapshot_service.take(home, LIMITS)
    there = replace(home, host=bench.hosts[1], epoch=2)
    coming = asyncio.create_task(bench.snapshot_service.restore(there))
    await bench.create(there, activated=False)
    assert await _come(coming, bench, there) == copied.snapshot
    assert await bench.files(there) == {"file": "precious"}
    never = await refusal(bench.snapshot_service.restore(replace(there, epoch=3)))
    assert never.code == "stale_epoch", "it does not wait for ever"


async def _come(early: asyncio.Task[Snapshot | None], bench: RealSnapshotBench, home: Home) -> Snapshot | None:
    """Ask again where it came too early, as a manager does: the worker waits a second, and this one may be slower."""
    (found,) = await asyncio.gather(early, return_exceptions=True)
    if isinstance(found, SnapshotError) and found.code == "unknown_rental":
        return await bench.snapshot_service.restore(home)
    return await early


@contextmanager
def _standing(worker: Worker) -> Iterator[None]:
    """Keep a connection to the worker, as the manager's engine does."""
    serving = ["docker", "exec", "-i", worker.name, "orion-rental", "serve"]
    with subprocess.Popen(serving, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as standing:
        assert standing.stdout
        assert json.loads(standing.stdout.readline()) == {"ready": True}
        yield


async def test_the_resident_server_runs_transfers_without_importing_more_modules(
    real: RealSnapshotService, rental: Rental
) -> None:
    rental.ssh("echo precious > file")
    program, aside = "/usr/local/lib/orion/orion_worker/rental/cli.py", "/usr/local/lib/orion/aside.py"
    with _standing(rental.on):
        rental.on.run("mv", program, aside)
        try:
            copied = await real.client.take(home_of(rental), LIMITS)
            stale = await refusal(real.client.take(replace(home_of(rental), epoch=7), LIMITS))
            again = await refusal(real.client.restore(home_of(rental)))
            knocked = rental.ssh(
                f"python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"{SOCKET_PATH}\")'"
            )
        finally:
            rental.on.run("mv", aside, program)
    assert (real.copy_of(home_of(rental), str(copied.snapshot.id)) / "file").read_text() == "precious\n"
    assert (stale.code, again.code) == ("stale_epoch", ALREADY_ACTIVATED)
    assert "PermissionError" in knocked.stderr
    assert (await real.client.take(home_of(rental), LIMITS)).snapshot.files == copied.snapshot.files, (
        "no process of the renter is there now"
    )


async def test_a_home_without_permissions_is_in_snapshots_as_any_other(
    real: RealSnapshotService, rental: Rental
) -> None:
    rental.ssh("echo > file")
    await real.client.take(home_of(rental), LIMITS)
    rental.ssh("echo precious > file; chmod 0 .")
    copied = (await real.client.take(home_of(rental), LIMITS)).snapshot
    assert (real.copy_of(home_of(rental), str(copied.id)) / "file").read_text() == "precious\n"
    await _rental(rental.on, "freeze", rental_id=rental.rental_id, epoch=rental.epoch, move=2)
    for _ in range(2):
        moving = (await real.client.take(home_of(rental), LIMITS, deadline_s=60, for_migration=True)).snapshot
    assert (real.copy_of(home_of(rental), str(moving.id)) / "file").read_text() == "precious\n"
    await _rental(rental.on, "thaw", rental_id=rental.rental_id, epoch=rental.epoch, move=2)


async def test_a_request_with_mixed_identities_reads_no_neighbour_s_files(
    real: RealSnapshotService, rental: Rental, folder: Path
) -> None:
    other = new_rental(rental.on, folder).create_quickly()
    other.ssh("echo secret > file")
    await real.client.take(home_of(other), LIMITS)
    mixed = replace(home_of(other), uid=rental.uid)
    assert (await refusal(real.client.take(mixed, LIMITS))).code == "conflict"
    assert (await refusal(real.client.restore(mixed))).code == "conflict"
    for wrong in ("..", "../etc", other.username + "/..", ""):
        assert (await refusal(real.client.take(replace(mixed, rental_id=wrong), LIMITS))).code == "invalid_request"
        done = rental.on.ssh(
            "root",
            rental.on.key,
            "orion-rental send",
            json.dumps({"rental_id": wrong, "epoch": 1, "deadline": 4e9}) + "\n",
        )
        assert (done.returncode, json.loads(done.stdout)["code"]) == (2, "invalid_request")
    for uid in (0, 900, 902, 99_999):
        assert (await refusal(real.client.take(replace(mixed, uid=uid), LIMITS))).code == "invalid_request"


async def test_a_stored_snapshot_is_readable_only_by_the_uid_of_its_rental(
    real: RealSnapshotService, rental: Rental
) -> None:
    await real.client.take(home_of(rental), LIMITS)
    place = real.copies / rental.rental_id
    status = place.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (rental.uid, rental.uid, 0o700)
    assert (real.folder / "run/ssh").stat().st_mode & 0o7777 == 0o700


async def test_an_aborted_snapshot_keeps_the_former_one_and_leaves_no_process(
    real: RealSnapshotService, rental: Rental
) -> None:
    rental.ssh("echo first > file")
    first = (await real.client.take(home_of(rental), LIMITS)).snapshot
    rental.ssh("head -c 60000000 /dev/urandom > large")
    for pause_s in (0.05, 0.15, 0.3, 0.45):
        copying = asyncio.create_task(real.client.take(home_of(rental), LIMITS))
        await asyncio.sleep(pause_s)
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)
    assert first in await real.client.snapshots(rental.rental_id, rental.uid)
    await asyncio.to_thread(wait_until, lambda: not real.running(rental.uid), "the killed processes have ended")
    assert (await real.client.take(home_of(rental), LIMITS)).snapshot.bytes > 60_000_000


def fillers(rental: Rental) -> set[str]:
    """Return the processes of rsync that fill a home: they hold its rental's lock."""
    return set(rental.on.run("pgrep", "-u", str(rental.uid), "rsync", check=False).split())


async def test_no_renter_is_activated_during_a_restore_and_an_aborted_restore_is_repeated(
    real: RealSnapshotService, rental: Rental, neighbour: Worker
) -> None:
    rental.ssh("head -c 60000000 /dev/urandom > large; echo > small")
    await real.client.take(home_of(rental), LIMITS)
    migrated = replace(rental, on=neighbour, epoch=2)
    await _rental(neighbour, "create", **migrated.variables, public_keys=[migrated.key.public])
    restoring = asyncio.create_task(real.client.restore(home_of(migrated)))
    await asyncio.sleep(0.2)
    restoring.cancel()
    await asyncio.gather(restoring, return_exceptions=True)
    assert not migrated.accepts()
    first = asyncio.create_task(real.client.restore(home_of(migrated)))
    await asyncio.sleep(0.2)
    restoring = asyncio.create_task(real.client.restore(home_of(migrated)))
    before = fillers(migrated)
    assert (await refusal(first)).code == "superseded"
    begun_or_over = lambda: restoring.done() or fillers(migrated) - before  # noqa: E731 - one check may take longer than the restore
    await asyncio.to_thread(wait_until, begun_or_over, "the worker fills the home")
    unlocking = asyncio.create_task(_rental(neighbour, "unlock", rental_id=migrated.rental_id, epoch=2))
    (copy,) = [await restoring]
    assert copy
    await unlocking
    assert migrated.ssh("stat -c %s large").stdout == "60000000\n"
    assert (await refusal(real.client.restore(home_of(migrated)))).code == ALREADY_ACTIVATED


async def test_a_frozen_home_is_recovered_and_its_processes_are_killed(
    real: RealSnapshotService, pair: tuple[Worker, Worker], folder: Path
) -> None:
    rental = new_rental(pair[0], folder).create_quickly()
    rental.ssh("echo precious > file; setsid sleep 1000 >/dev/null 2>&1 </dev/null &")
    status, _ = rental.on.rental("freeze", rental_id=rental.rental_id, epoch=1)
    assert status == 0
    recovered = await real.client.recover(home_of(rental), LIMITS)
    assert recovered.snapshot.recovered
    assert (real.copy_of(home_of(rental), str(recovered.snapshot.id)) / "file").read_text() == "precious\n"

    def is_ended() -> bool:
        return not rental.on.run("ps", "-o", "pid=", "-u", str(rental.uid), check=False).strip()

    await asyncio.to_thread(wait_until, is_ended, "nothing runs, and the dead are reaped")
    for late in ("freeze", "thaw", "unlock"):
        status, report = rental.on.rental(late, rental_id=rental.rental_id, epoch=1)
        assert (status, report["code"]) == (3, "laid_down")
    assert not rental.accepts()
    assert (await asyncio.to_thread(rental.delete)).ok


async def test_a_rental_over_its_limits_stays_frozen_until_an_order_thaws_it(
    real: RealSnapshotService, pair: tuple[Worker, Worker], folder: Path
) -> None:
    rental = new_rental(pair[0], folder).create_quickly()
    few = SnapshotLimits(max_files=50, max_bytes=1 << 20)
    rental.ssh("mkdir many && cd many && touch $(seq 60); setsid sleep 1000 >/dev/null 2>&1 </dev/null &")
    over = await refusal(real.client.take(home_of(rental), few))
    assert (over.code, "more than 50 files" in str(over), "orion thaw" in str(over)) == ("over_limit", True, True)
    states = ("ps", "-o", "stat=", "-u", str(rental.uid))

    def stopped() -> bool:
        return {state[0] for state in rental.on.run(*states).split()} == {"T"}

    # One that was in the kernel finds its SIGSTOP when it comes back from there, which takes a turn of the processor.
    await asyncio.to_thread(wait_until, stopped, "all processes are stopped")
    assert not rental.accepts()
    rental.on.manager.placements = [placement(rental, "run")]
    calls = len(rental.on.manager.calls)
    await asyncio.to_thread(
        wait_until, lambda: len(rental.on.manager.calls) > calls + 3, "some replies have the order to run"
    )
    rental.on.manager.placements = []
    assert not rental.accepts(), "a reply does not thaw it"
    assert str(await refusal(real.client.take(home_of(rental), few))) == str(over), "the home is not counted again"
    thawed = await asyncio.to_thread(lambda: rental.on.playbook("thaw", rental_id=rental.rental_id, epoch=1))
    assert thawed.ok, thawed.output
    assert "unless it does" in str(await refusal(real.client.take(home_of(rental), few)))
    assert rental.ssh("rm -r many; echo kept > file").returncode == 0
    copied = await real.client.take(home_of(rental), few)
    assert copied.snapshot.files == 2
    assert rental.accepts()
    assert (await asyncio.to_thread(rental.delete)).ok
    assert rental.traces() == ""
