"""Attacks of a lying worker: a program instead of `orion-rental send` may send any answer, and uses the real rsync.

The snapshot service is the shipped program, run as root; only its ssh is replaced. Its programs that have a rental's
uid are copied to a directory that any uid may read, because this project may be in a directory of root.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from orion_worker.snapshots import transfer
from snapshot_service_contract import refusal
from support.patience import PATIENCE_S
from worker_support import ROOT, takes_connections, wait_until

from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import BLOCK_BYTES
from orion.manager.snapshots.client import SnapshotClient
from orion.manager.snapshots.disk import Disk
from orion.manager.snapshots.port import OVER_LIMIT, OVER_SHARE, Home, SnapshotError
from orion.manager.snapshots.transfer import OPTIONS
from orion.manager.ssh.port import Host

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acting under other uids needs root; CI is root")

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA1u4uxDZrVBrtPLCdoyRvjgTAcxyaAZ7bVpKZbyTsA5"
LIMITS = SnapshotLimits(max_files=1000, max_bytes=4 << 20)
SERVICE = """
import os, pathlib, shutil, sys
from orion.manager.snapshots import jobs, server, transfer
liar = sys.argv.pop(1)
sys.executable = os.path.realpath(sys.executable)
transfer.BRIDGE = pathlib.Path(shutil.copy(transfer.BRIDGE, pathlib.Path(liar).with_name("bridge.py")))
jobs.worker_ssh = lambda *_: [sys.executable, liar]
server.main()
"""
LIAR = r"""
import json, os, subprocess, sys, time
while os.read(0, 1) not in (b"\n", b""):
    pass
def hello(**message):
    os.write(1, json.dumps(message or {"ok": True}).encode() + b"\n")
def rsync(change=lambda data: data):
    with open("../list", "wb") as listed:
        listed.write(b"\0".join(map(os.fsencode, os.listdir("."))))
    program = ["rsync", *ARGUMENTS]
    sender = subprocess.Popen(program, stdout=subprocess.PIPE)
    while data := os.read(sender.stdout.fileno(), 1 << 20):
        data = change(data)
        while data:
            data = data[os.write(1, data):]
"""


class Liar:
    """A lying worker. `says` sets the answering program, `home` has its files, `begin` changes its rental."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.home = place / "home"
        self.program = place / "liar.py"
        self.client = SnapshotClient(place / "run/vault.sock")
        self.begin()

    def begin(self) -> None:
        self.uid = 1_000_000_000 + secrets.randbelow(10**9)
        self.name = f"liar{secrets.token_hex(4)}"
        self.of = Home(
            rental_id=self.name,
            uid=self.uid,
            epoch=1,
            host=Host(worker_id="w-liar", address="192.0.2.1", host_keys=(KEY,)),
        )
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        self.says("hello(); rsync()")

    def says(self, program: str) -> None:
        begin = f"ARGUMENTS = {transfer.ARGUMENTS['send']}\nos.chdir({str(self.home)!r})"
        self.program.write_text(f"{LIAR}\n{begin}\n{program}\n")

    def shows(self, **files: str) -> None:
        for name, content in files.items():
            (self.home / name).write_text(content)

    @property
    def kept(self) -> dict[str, str]:
        """Return the names and first bytes of all files in the newest complete snapshot."""
        places = [place for place in (self.place / "copies" / self.name).iterdir() if place.name != "incoming"]
        newest = max(places, key=lambda place: int(place.name.split("-")[1])) / "home"
        return {file.name: file.read_text()[:20] for file in newest.iterdir() if file.is_file()}

    @staticmethod
    def under(place: Path) -> list[Path]:
        """Return all that is below a directory, which the service may be removing things from; no link is followed."""
        return [Path(folder) / name for folder, *both in os.walk(place) for names in both for name in names]

    def running(self) -> list[str]:
        wanted = f"Uid:\t{self.uid}\t"
        found = []
        for place in Path("/proc").iterdir():
            with suppress(OSError):
                status = (place / "status").read_text(errors="replace") if place.name.isdecimal() else ""
                if wanted in status and "\nState:\tZ" not in status:
                    found.append(str(place))
        return found


@pytest.fixture(scope="module")
def liar(folder: Path) -> Iterator[Liar]:
    place = folder / f"l{secrets.token_hex(3)}"
    for directory in ("copies", "run", "run/ssh"):
        (place / directory).mkdir(parents=True)
    for directory in (folder, place, place / "copies"):
        directory.chmod(0o711)
    arguments = ["--copies", str(place / "copies"), "--run", str(place / "run"), "--ssh-uid", "0", "--group", "0"]
    made = Liar(place)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen([sys.executable, "-c", SERVICE, str(made.program), *arguments], env=environment)
    try:
        wait_until(lambda: takes_connections(place / "run/vault.sock"), "the snapshot service listens")
        yield made
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
async def stored(liar: Liar) -> Liar:
    """Return a worker that was honest once, so that there is a snapshot."""
    liar.begin()
    liar.shows(honest="first")
    await liar.client.take(liar.of, LIMITS)
    return liar


def many(liar: Liar) -> None:
    for number in range(1500):
        (liar.home / f"file-{number}").touch()


def much(liar: Liar) -> None:
    for number in range(10):
        (liar.home / f"file-{number}").write_bytes(os.urandom(3 << 20))


def one_too_large(liar: Liar) -> None:
    with (liar.home / "large").open("wb") as file:
        file.truncate(1 << 40)


def nothing(_: Liar) -> None:
    """Show no files: the worker sends only its messages."""


@pytest.mark.parametrize(
    ("has", "says", "codes"),
    [
        (many, "hello(); rsync()", {"over_limit"}),
        (much, "hello(); rsync()", {"over_limit"}),
        (one_too_large, "hello(); rsync()", {"over_limit"}),
        (nothing, "hello()\nwhile True: os.write(1, bytes(1 << 16))", {"failed"}),
        (nothing, "hello()\nwhile True: os.write(1, b'x' * (1 << 16))", {"failed"}),
        (nothing, "hello()\nos.close(1)\ntime.sleep(60)", {"failed"}),
        (nothing, "hello(); time.sleep(60)", {"timed_out"}),
        (nothing, "time.sleep(60)", {"timed_out"}),
        (nothing, "while True: os.write(1, b'x')", {"unreachable"}),
        (nothing, "os.write(1, b'[]\\n')", {"refused"}),
        (nothing, "sys.exit(1)", {"unreachable"}),
        (nothing, "hello(ok=False, code='let_in\\x1b[2J', error='\\x1b]0;owned\\x07' + 'x' * 3000)", {"refused"}),
        (nothing, "hello(ok=1)", {"refused"}),
        (nothing, "hello(ok=True, whole=True, after_s='x')", {"unreachable"}),
        (nothing, "hello(ok=True, folders=7)", {"unreachable"}),
        (nothing, "hello(ok=True, folders={'../escape': 448}); rsync()", {"unreachable"}),
        (nothing, "hello(ok=True, folders={'2f657463': 448}); rsync()", {"unreachable"}),
        (nothing, "hello(ok=True, folders={'2e2f2e2e2f78': 448}); rsync()", {"unreachable"}),
        (nothing, "hello(ok=True, folders={'2e2f00': 448}); rsync()", {"unreachable"}),
        (nothing, "hello(ok=True, folders={'2e2f61': 1 << 40}); rsync()", {"unreachable"}),
        (nothing, "hello(ok=True, folders={'2e2f61': float('inf')}); rsync()", {"unreachable"}),
        (nothing, "hello(ok=True, folders={'2e2f%08x' % n: 448 for n in range(3000)}); rsync()", {"unreachable"}),
        (nothing, "os.write(1, b'[' * 16000 + b'\\n')", {"unreachable"}),
        (nothing, "os.write(1, b'{\"ok\": ' + b'9' * 9000 + b'}\\n')", {"unreachable"}),
        (many, "hello(ok=True, after_s=-1e300); rsync()", {"over_limit"}),
    ],
)  # fmt: skip
async def test_no_output_of_a_worker_hangs_the_snapshot_service_or_damages_stored_snapshots(
    stored: Liar, has: Callable[[Liar], None], says: str, codes: set[str]
) -> None:
    has(stored)
    stored.says(says)
    # Other refusals than a timeout get enough time: a busy machine reads a hundred thousand bytes in seconds.
    deadline_s = 3.0 if codes == {"timed_out"} else PATIENCE_S
    refused = await refusal(stored.client.take(stored.of, LIMITS, deadline_s=deadline_s))
    assert refused.code in codes, refused
    assert "\x1b" not in str(refused)
    assert len(str(refused)) < 500
    assert stored.kept == {"honest": "first"}
    wait_until(lambda: not stored.running(), "nothing of it runs any more")


def folders(liar: Liar) -> None:
    for number in range(900):
        (liar.home / f"folder-{number}").mkdir()


async def test_empty_directories_that_a_worker_does_not_report_count_with_their_real_size(stored: Liar) -> None:
    folders(stored)
    few, enough = SnapshotLimits(max_files=1000, max_bytes=3 << 20), SnapshotLimits(max_files=1000, max_bytes=4 << 20)
    refused = await refusal(stored.client.take(stored.of, few))
    assert (refused.code, "more than a snapshot may" in str(refused)) == (OVER_LIMIT, True)
    copy = (await stored.client.take(stored.of, enough)).snapshot
    assert (copy.files, copy.bytes >= 902 * BLOCK_BYTES) == (902, True)


async def test_data_beyond_an_owner_s_share_is_removed_and_snapshots_of_others_continue(liar: Liar) -> None:
    share = (2 << 20) / Disk.of(liar.place).size.bytes
    limits = replace(LIMITS, owner_share=share)
    folders_of_owner = []
    for owner, code in (("greedy", ""), ("greedy", OVER_SHARE), ("modest", "")):
        liar.begin()
        (liar.home / "large").write_bytes(os.urandom(3 << 19))
        copying = liar.client.take(replace(liar.of, owner=owner), limits)
        if code:
            assert (await refusal(copying)).code == code
        else:
            await copying
        folders_of_owner.append(liar.place / "copies" / liar.name)
    first, refused, other = folders_of_owner
    wait_until(lambda: not list(refused.iterdir()), "nothing of it is left")
    assert [place.name for place in (*first.iterdir(), *other.iterdir())] == ["1-1", "1-1"]
    assert first.name in await liar.client.rentals()
    assert "greedy" in await liar.client.short_of_room()


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("QQ_escape", "../escape"),
        ("QQ_QQ_escape", "../../escape"),
        ("Qtmp_escape", "/tmp/escape"),  # noqa: S108
        ("link_escape", "link/escape"),
    ],
)
async def test_names_that_lead_out_of_a_home_write_and_read_no_file(stored: Liar, name: str, sent: str) -> None:
    """Use names of the same length, so that the stream stays valid for rsync."""
    outside = stored.place / "outside"
    outside.mkdir(exist_ok=True)
    outside.chmod(0o777)
    (stored.home / "link").symlink_to(outside)
    stored.shows(**{name: "escaped"})
    stored.says(f"hello(); rsync(lambda data: data.replace({name.encode()!r}, {sent.encode()!r}))")
    assert len(name) == len(sent)
    refused = await refusal(stored.client.take(stored.of, LIMITS, deadline_s=PATIENCE_S))
    assert refused.code == "failed"
    assert stored.kept == {"honest": "first"}
    assert list(outside.iterdir()) == []
    assert "escape" not in os.listdir("/tmp")  # noqa: PTH208, S108
    escaped = [file for file in stored.under(stored.place) if file.name.startswith("escape")]
    assert [file for file in escaped if "home" not in file.parts[-2:]] == []


LISTED = r"""
def rsync(*listed):
    with open("../list", "wb") as file:
        file.write(b"\0".join(listed))
    subprocess.run(["rsync", *ARGUMENTS])
"""


@pytest.mark.parametrize(
    "listed",
    [
        [b"d", b"d/x"],
        [b"d/x", b"d"],
        [b"d/x", b"d/x", b"d", b"d", b"."],
        [b"./d/../d/x", b"//d//x", b"d/./x"],
        [b"d/../../outside/x", b"../outside/x"],
        [b"/d/x", b"-rf", b"--delete", b"d/" + b"y" * 255, b"d/" * 2000 + b"x"],
        [b"d\n/x", b"\xff\xfe/x", b"\x1b[2J"],
    ],
    ids=lambda listed: repr(listed[0]),
)
@pytest.mark.parametrize("becomes", ["a link", "a file"])
async def test_a_directory_that_becomes_a_link_or_file_in_the_next_snapshot_leads_out_of_no_home(
    stored: Liar, listed: list[bytes], becomes: str
) -> None:
    outside = stored.place / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    outside.chmod(0o777)
    (stored.home / "d").mkdir()
    (stored.home / "d/x").write_text("first")
    await stored.client.take(stored.of, LIMITS)
    shutil.rmtree(stored.home / "d")
    if becomes == "a link":
        (stored.home / "d").symlink_to(outside)
        (outside / "x").write_text("worker's")
    else:
        (stored.home / "d").write_text("file")
    stored.says(f"{LISTED}\nhello(); rsync(*{listed!r})")
    with suppress(SnapshotError):
        await stored.client.take(stored.of, LIMITS, deadline_s=PATIENCE_S)
    found = {file.name: file.read_text() for file in outside.iterdir()}
    assert found == ({"x": "worker's"} if becomes == "a link" else {})
    assert stored.kept["honest"] == "first"
    links = [place for place in stored.under(stored.place / "copies" / stored.name) if place.is_symlink()]
    assert links == [], "a link is kept as a file with where it leads"
    assert not (stored.place / "copies" / stored.name / "outside").exists()


def test_worker_and_snapshot_service_use_the_same_arguments_of_rsync(liar: Liar) -> None:
    """Compare the worker's command with the one that rsync would send, without options of this side only."""
    recorder = liar.place / "recorder"
    recorder.write_text('#!/bin/sh\nshift\necho "$@" >&2\nexit 1\n')
    recorder.chmod(0o755)
    listed = liar.place / "listed"
    listed.write_bytes(b"file\0")
    inward, outward = ("worker:.", f"{liar.home}/"), (f"{liar.home}/", "worker:.")
    for kind, more, ends in (
        ("send", (), inward),
        ("whole", (), inward),
        ("receive", (), outward),
        ("update", (f"--files-from={listed}",), outward),
    ):
        command = ["rsync", "-e", str(recorder), *OPTIONS[kind], *more, *ends]
        asked = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()[0]
        assert asked.split() == ["rsync", *transfer.ARGUMENTS[kind]], kind
    assert OPTIONS.keys() == transfer.ARGUMENTS.keys()


def test_the_process_that_receives_files_of_a_worker_cannot_read_the_ssh_key(liar: Liar) -> None:
    """Act with the uid of the receiving rsync: it may reach no key, no socket and no snapshot of another rental."""
    stored = liar
    (stored.place / "run/ssh/id_ed25519").write_text("secret")
    (stored.place / "copies/other").mkdir(mode=0o700)
    tries = ("run/ssh/id_ed25519", "run/locks", "copies/other", "run/vault.sock")
    become = ["setpriv", f"--reuid={stored.uid}", f"--regid={stored.uid}", "--clear-groups"]
    (stored.place / "run/ssh").chmod(0o700)
    for path in tries:
        done = subprocess.run([*become, "test", "-r", str(stored.place / path)], check=False)
        assert done.returncode == 1, path
    assert subprocess.run([*become, "ls", str(stored.place / "copies")], capture_output=True, check=False).returncode
