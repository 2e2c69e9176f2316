"""Tests of delete_user.yml against a renter that resists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rental_support import Rental, new_rental
from worker_support import Worker, docker, wait_until

LITTER = r"""
import ctypes, os, socket, subprocess
home = os.path.expanduser("~")
libc = ctypes.CDLL(None, use_errno=True)
for place in ("/tmp", "/var/tmp", "/dev/shm", "/run/lock"):
    path = f"{place}/of-{os.getuid()}"
    open(path, "w").write("x")
    os.chmod(path, 0o4755)
    os.mkdir(f"{path}.d")
    open(f"{path}.d/shut", "w").write("x")
    os.mkfifo(f"{path}.d/pipe")
    os.symlink("/etc", f"{path}.d/etc")
    os.symlink("/home", f"{path}.link")
    os.chmod(f"{path}.d", 0)
socket.socket(socket.AF_UNIX).bind(f"/tmp/socket-{os.getuid()}")
os.link(f"/var/tmp/of-{os.getuid()}", "/var/tmp/second-name")
for number in range(3000):
    open(f"{home}/name-{number}", "w")
os.symlink("/etc/passwd", f"{home}/passwd")
os.chdir(home)
for _ in range(2500):  # far deeper than a path can be long
    os.mkdir("d"); os.chdir("d")
open("bottom", "w").write("x")
assert libc.shmget(0x1111, 4096, 0o1600) >= 0
assert libc.semget(0x2222, 1, 0o1600) >= 0
assert libc.msgget(0x3333, 0o1600) >= 0
assert libc.mq_open(b"/queue", os.O_CREAT | os.O_RDWR, 0o600, None) >= 0
subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM HUP INT; while :; do sleep 1; done"],
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
"""

RUNNER_AWAY = r"""
import os, signal, time
if os.fork():
    os._exit(0)
os.setsid()
for number in (0, 1, 2):
    os.close(number)
for _ in range(2):
    os.fork()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:  # never the same process twice: the child goes on, the parent ends
    try:
        if os.fork():
            os._exit(0)
    except OSError:
        time.sleep(0.001)
"""

KILLED_PURGE = r"""
import os, subprocess, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # both on one processor, which the killer gets at once
purge = subprocess.Popen(["nice", "-n", "19", "orion-rental", "purge"], stdin=subprocess.PIPE)
purge.stdin.write(sys.argv[1].encode())
purge.stdin.close()
while '"ending": true' not in open(sys.argv[2]).read():
    time.sleep(0.002)
purge.kill()
purge.wait()
"""


@pytest.fixture
def rental(host: Worker, folder: Path) -> Rental:
    return new_rental(host, folder)


def test_a_purge_removes_a_renter_that_hides_and_forks_and_nothing_of_a_neighbour(rental: Rental, folder: Path) -> None:
    rental.create_quickly()
    neighbour = new_rental(rental.on, folder).create_quickly()
    neighbour.ssh("setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo kept > ~/file; mkdir -m 777 ~/open; chmod 711 ~")
    rental.python(LITTER)
    rental.ssh(f"echo x > /home/{neighbour.username}/open/left; mkdir /home/{neighbour.username}/open/dir")
    neighbour.ssh("ln /var/tmp/second-name ~/linked")
    rental.ssh("echo at a terminal", "", "-tt")
    rental.ssh("python3 - >/dev/null 2>&1", RUNNER_AWAY)
    assert len(rental.traces().splitlines()) > 20

    played = rental.delete()

    assert played.ok, played.output
    assert played.last["left"] == []
    assert played.last["unsearched"] == []
    assert played.last["killed"] >= 2
    assert played.last["removed_files"] > 5500
    assert {"/", "/dev/mqueue", "processes", "System V IPC"} <= set(played.last["looked"])
    assert rental.traces() == ""
    assert neighbour.accepts()
    kept = neighbour.ssh("cat ~/file; ls ~; pgrep -c -u $(id -u) sleep").stdout.split()
    assert kept == ["kept", "file", "open", "1"]


def test_a_purged_epoch_never_comes_back_and_purging_again_is_a_success(rental: Rental) -> None:
    rental.create_quickly()
    status, report = rental.on.rental("purge", **rental.variables)
    assert (status, report["changed"]) == (0, True)
    again = rental.delete()
    assert again.ok, again.output
    assert not again.changed
    refused = rental.create()
    assert not refused.ok
    assert refused.last["code"] == "purged"
    assert rental.traces() == ""
    rental.epoch = 2
    rental.create_quickly()
    assert rental.accepts()


def test_a_stale_purge_does_not_touch_a_newer_epoch(rental: Rental) -> None:
    rental.epoch = 5
    rental.create_quickly()
    late = rental.delete(epoch=4)
    assert not late.ok
    assert late.last["code"] == "stale_epoch"
    assert rental.accepts()


def test_the_purge_of_an_unknown_rental_succeeds(rental: Rental) -> None:
    played = rental.delete()
    assert played.ok, played.output
    assert not played.changed
    assert played.last["left"] == []


def test_files_that_reappear_are_reported_and_the_rental_stays_in_the_inventory(rental: Rental) -> None:
    rental.create_quickly()
    again = f"until test -e /run/enough; do touch /tmp/back; chown {rental.uid} /tmp/back; done"
    for _ in range(4):  # one alone may get no turn between the last removal and the look after it
        docker("exec", "--detach", rental.on.name, "sh", "-c", again)
    wait_until(lambda: rental.on.run("ls", "/tmp/back", check=False), "it comes back")  # noqa: S108
    try:
        played = rental.delete()
        assert not played.ok
        assert played.last["left"] == ["file /tmp/back"]
        assert played.last["code"] == "left_behind"
        assert rental.rental_id in rental.on.run("orion-rental", "inventory")
    finally:
        rental.on.run("touch", "/run/enough")
    wait_until(lambda: not rental.on.run("pgrep", "-f", "/run/enough", check=False), "no program makes it again")
    assert rental.on.rental("purge", **rental.variables)[0] == 0
    assert rental.rental_id not in rental.on.run("orion-rental", "inventory")


def test_a_purge_that_was_killed_is_finished_by_the_next(rental: Rental) -> None:
    rental.create_quickly()
    rental.python("import os\nfor n in range(20000): open(os.path.expanduser(f'~/{n}'), 'w')")
    record = f"/var/lib/orion/rentals/{rental.rental_id}.json"
    rental.on.run("python3", "-c", KILLED_PURGE, json.dumps(rental.variables), record)
    status, report = rental.on.rental("create", **rental.variables, public_keys=[rental.key.public])
    assert (status, report["code"]) == (3, "purge_unfinished")
    assert rental.rental_id in rental.on.run("orion-rental", "inventory")
    status, report = rental.on.rental("purge", **rental.variables)
    assert (status, report["left"]) == (0, [])
    assert rental.traces() == ""


def test_one_order_removes_several_rentals_and_keeps_a_refused_one(host: Worker, folder: Path) -> None:
    first, second, newer = (new_rental(host, folder).create_quickly() for _ in range(3))
    newer.epoch = 2
    newer.create_quickly()
    for each in (first, second):
        each.ssh("echo mine > ~/file; setsid sleep 1000 >/dev/null 2>&1 </dev/null &")
    asked = [first.variables, newer.variables | {"epoch": 1}, second.variables]
    played = host.playbook("delete_user", rentals=asked)
    assert not played.ok
    of_first, of_newer, of_second = played.last["rentals"]
    assert of_newer["code"] == "stale_epoch"
    for each, report in ((first, of_first), (second, of_second)):
        assert report["left"] == []
        assert report["killed"] >= 1
        assert report["removed_files"] >= 2
        assert each.traces() == ""
    assert newer.accepts()
