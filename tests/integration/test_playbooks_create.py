"""create_user.yml on a real worker, seen by real log-ins."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from rental_support import Rental, new_rental
from worker_support import Worker, make_key, wait_until


@pytest.fixture
def rental(host: Worker, folder: Path) -> Rental:
    return new_rental(host, folder)


def test_a_created_account_accepts_only_its_key_and_a_second_run_changes_nothing(rental: Rental, folder: Path) -> None:
    played = rental.create()
    assert played.ok, played.output
    assert played.changed
    assert played.last["state"] == "running"
    assert rental.accepts()
    assert not rental.accepts(make_key(folder))
    assert rental.ssh("stat -c %a:%u:%g ~").stdout.strip() == f"700:{rental.uid}:{rental.uid}"
    again = rental.create()
    assert again.ok, again.output
    assert not again.changed


def test_new_keys_replace_the_old_ones_of_a_running_rental(rental: Rental, folder: Path) -> None:
    rental.create_quickly()
    new = make_key(folder)
    status, report = rental.on.rental("create", **rental.variables, public_keys=[new.public])
    assert (status, report["changed"], report["state"]) == (0, True, "running")
    assert rental.accepts(new)
    assert not rental.accepts()


SAYS = "echo $ORION_RENTAL,$ORION_RENTAL_ID"


def test_sessions_have_the_name_of_the_rental_in_variables_and_in_the_prompt(rental: Rental) -> None:
    assert rental.create(rental_name="my-lab").ok
    assert rental.ssh(SAYS).stdout == f"my-lab,{rental.rental_id}\n"
    prompt = rental.ssh("cd /tmp; bash -i", "exit\n").stderr
    assert "my-lab:/tmp$ " in prompt, prompt
    rental.ssh("mkdir -p .ssh; echo LD_PRELOAD=/tmp/x > .ssh/environment; echo ORION_RENTAL=mine >> .ssh/environment")
    assert rental.ssh("echo $LD_PRELOAD").stdout == "\n", "a file in the home sets no other variable"
    status, _ = rental.on.rental("create", **rental.variables, public_keys=[rental.key.public])
    assert status == 0
    rental.ssh("rm -r .ssh")
    assert rental.ssh(SAYS).stdout == f"my-lab,{rental.rental_id}\n", "an order by hand does not change the name"


def test_a_created_account_is_locked_until_its_epoch_is_unlocked(rental: Rental) -> None:
    rental.on.rental("create", **rental.variables, public_keys=[rental.key.public])
    assert not rental.accepts()
    status, report = rental.on.rental("unlock", rental_id=rental.rental_id, epoch=2)
    assert (status, report["code"]) == (3, "stale_epoch")
    assert not rental.accepts()
    assert rental.on.rental("unlock", rental_id=rental.rental_id, epoch=1)[0] == 0
    assert rental.accepts()


def test_a_lower_epoch_is_refused_with_a_reason_and_a_higher_one_is_accepted(rental: Rental) -> None:
    rental.epoch = 2
    rental.create_quickly()
    late = rental.create(epoch=1)
    assert not late.ok
    assert late.last["code"] == "stale_epoch"
    assert late.last["msg"] == "epoch 1 is older than epoch 2, which was seen here"
    assert rental.accepts()
    rental.epoch = 3
    rental.create_quickly()
    assert rental.accepts()


def test_an_order_past_its_deadline_is_refused(rental: Rental) -> None:
    late = rental.create(deadline=int(time.time()) - 1)
    assert not late.ok
    assert late.last["code"] == "deadline_passed"
    assert rental.traces() == ""


def test_a_locked_rental_refuses_its_renter_and_loses_its_processes(rental: Rental) -> None:
    rental.create_quickly()
    rental.ssh("setsid sleep 1000 >/dev/null 2>&1 </dev/null &")
    status, report = rental.on.rental("lock", rental_id=rental.rental_id, epoch=1, kill=True)
    assert status == 0
    assert report["killed"] >= 1
    assert not rental.accepts()
    wait_until(lambda: str(rental.uid) not in rental.on.run("ps", "-eo", "ruid"), "the dead are reaped")


def test_a_name_or_number_of_another_rental_is_refused(rental: Rental, folder: Path) -> None:
    rental.create_quickly()
    other = new_rental(rental.on, folder)
    other.uid = rental.uid
    for command in ("create", "purge"):
        keys = {"public_keys": [other.key.public]} if command == "create" else {}
        status, report = rental.on.rental(command, **other.variables, **keys)
        assert (status, report["code"]) == (3, "conflict")
    assert rental.accepts()


SERVE = """echo "I'm $(id -un) in $PWD, $SHELL"; tty; ulimit -u; ps -o sid=,pid= -p $$; exec sleep 1000"""


def test_a_start_command_has_the_uid_of_its_renter_and_is_frozen_and_killed_with_the_rental(rental: Rental) -> None:
    def log() -> str:
        return rental.on.run("sh", "-c", f"cat /home/{rental.username}/.orion/start.log || true")

    def states() -> set[str]:
        return set(rental.on.run("sh", "-c", f"ps -o stat= -U {rental.uid} | cut -c1").split())

    boot = rental.on.run("cat", "/run/orion/boot-id").strip()
    played = rental.create(start=SERVE, start_mark=f"1@{boot}")
    assert played.ok, played.output
    assert played.last["started"] is True
    wait_until(lambda: len(log().splitlines()) == 5, "the command has printed its user")
    _, user, terminal, processes, session = log().splitlines()
    assert user == f"I'm {rental.username} in /home/{rental.username}, /bin/bash"
    assert terminal == "not a tty"
    assert processes == rental.ssh("ulimit -u").stdout.strip()
    assert len(set(session.split())) == 1, "it leads a session of its own"
    assert rental.ssh("stat -c %u:%a ~/.orion/start.log").stdout.strip() == f"{rental.uid}:600"
    for _ in range(2):
        again = rental.create(start=SERVE, start_mark=f"1@{boot}")
        assert again.ok, again.output
        assert not again.changed
    assert log().count("runs:") == 1
    assert rental.on.rental("freeze", rental_id=rental.rental_id, epoch=1)[0] == 0
    wait_until(lambda: states() == {"T"}, "all processes are stopped")
    assert rental.on.rental("thaw", rental_id=rental.rental_id, epoch=1)[0] == 0
    wait_until(lambda: "T" not in states(), "it continues")
    deleted = rental.delete()
    assert deleted.ok, deleted.output
    assert deleted.last["killed"] >= 2
    assert rental.traces() == ""


def test_a_renter_that_leaves_no_room_for_its_start_command_is_still_activated(rental: Rental) -> None:
    rental.create_quickly()
    boot = rental.on.run("cat", "/run/orion/boot-id").strip()
    rental.ssh("ln -s /etc/shadow .orion; (while true; do sleep 1000 & done) >/dev/null 2>&1 </dev/null &")
    wait_until(lambda: "Resource" in rental.ssh("true").stderr or rental.ssh("true").returncode, "no process is left")
    wish = {**rental.variables, "public_keys": [rental.key.public], "start": "echo x", "start_mark": f"1@{boot}"}
    status, report = rental.on.rental("run", **wish)
    assert (status, report["state"], report["started"]) == (0, "running", False), report
    assert "cannot be run" in report["start_problem"]
    assert rental.delete().ok
