"""The agent in its container, calling a small manager."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from rental_support import Rental, new_rental, placement
from worker_support import (
    JOIN_TOKEN,
    SmallManager,
    Worker,
    WorkerNetwork,
    docker,
    join_directory,
    wait_until,
    worker,
)

STOPS_WITHIN_S = "60"
"""Seconds until Docker kills it, which its exit status shows: much more than start and end take on a busy machine."""


def test_a_worker_is_registered_and_reachable_within_seconds_of_its_start(
    network: WorkerNetwork, manager: SmallManager, join: Path
) -> None:
    with worker(network, manager, join, "--env", "ORION_LABELS=zone=a,disk=fast", slots=3) as new:
        new.wait_registered()
        assert new.ssh("root", new.key, "echo in").stdout == "in\n"
        call = manager.of("/api/register")[0]
        assert call.token == JOIN_TOKEN
        assert call.body["slots"] == 3
        assert call.body["labels"] == {"zone": "a", "disk": "fast"}
        assert call.body["inventory"] == []
        assert call.body["ssh_host_keys"][0].startswith("ssh-ed25519 ")
        wait_until(
            lambda: docker("inspect", "-f", "{{.State.Health.Status}}", new.name).strip() == "healthy", "healthy"
        )


def test_heartbeats_have_the_interval_of_the_last_reply(
    network: WorkerNetwork, manager: SmallManager, join: Path
) -> None:
    manager.interval_s = 0.3
    with worker(network, manager, join) as new:
        new.wait_registered()
        beats = wait_until(lambda: len(manager.of("/api/heartbeat")) > 4 and manager.of("/api/heartbeat"), "5 beats")
        assert (beats[-1].at - beats[0].at) / (len(beats) - 1) > 0.28, "no more often than the reply allows"
        assert [beat.body["seq"] for beat in beats] == list(range(1, len(beats) + 1))
        assert beats[-1].body["load"]["memory_limit_bytes"] == 512 * 2**20
        assert beats[-1].body["load"]["processes"] > 2
        manager.interval_s = 2.0
        changed_at = time.monotonic()  # taken after the change: an earlier call may get either answer
        first = wait_until(lambda: manager.of("/api/heartbeat", after=changed_at), "it has the other interval")[0]
        second = wait_until(lambda: manager.of("/api/heartbeat", after=first.at), "the one after that")[0]
        assert second.at - first.at > 1.9


def test_a_stale_session_is_registered_again_at_once_with_the_workers_own_token(
    network: WorkerNetwork, manager: SmallManager, join: Path
) -> None:
    with worker(network, manager, join) as new:
        new.wait_registered()
        manager.answers.append(("/api/heartbeat", 409, {"code": "stale_session"}))
        again = wait_until(lambda: manager.of("/api/register")[1:], "it registers again")
        assert again[0].token.startswith("orion_worker_w-")
        assert again[0].body["boot_id"] == manager.of("/api/register")[0].body["boot_id"]
        wait_until(lambda: manager.of("/api/heartbeat", after=again[0].at), "heartbeats continue")


def test_a_worker_keeps_its_identity_and_host_key_over_a_restart_and_says_goodbye(
    network: WorkerNetwork, manager: SmallManager, join: Path, folder: Path
) -> None:
    with worker(network, manager, join) as new:
        new.wait_registered()
        rental = new_rental(new, folder).create_quickly()
        rental.ssh("setsid sleep 1000 >/dev/null 2>&1 </dev/null &")
        host_keys = new.host_keys
        docker("stop", "--time", STOPS_WITHIN_S, new.name)
        beats = manager.of("/api/heartbeat")
        asked = [beat for beat in beats if beat.body.get("vacating")]
        (goodbye,) = [beat for beat in beats if beat.body.get("leaving")]  # a call of before may come in behind it
        assert goodbye.at - asked[0].at < 18, "it waits no longer than its grace of 8 s for its rentals"
        assert len(asked) > 2, "it repeats its call"
        assert docker("inspect", "-f", "{{.State.ExitCode}}", new.name).strip() == "0"
        assert [item["state"] for item in goodbye.body["inventory"]] == ["locked"]
        assert "ended" in new.log()

        restarted = time.monotonic()
        docker("start", new.name)
        new.wait_registered(after=restarted)
        call = manager.of("/api/register", after=restarted)[0]
        assert call.token.startswith("orion_worker_w-")
        assert new.host_keys == host_keys
        assert call.body["boot_id"] != manager.of("/api/register")[0].body["boot_id"]
        assert call.body["inventory"][0]["state"] == "locked"
        assert not rental.accepts(), "locked until a reply says run"
        manager.placements = [placement(rental, "run")]
        wait_until(lambda: _state(new, rental) == "running", "unlocked by a heartbeat's reply")
        assert rental.accepts()


@pytest.mark.parametrize("after_s", [0.0, 0.2, 0.6])
def test_a_worker_that_gets_sigterm_during_its_start_ends_at_once(
    network: WorkerNetwork, manager: SmallManager, join: Path, after_s: float
) -> None:
    """Stop it before it has handlers: process 1 ignores signals without one, and a worker has ten minutes of grace."""
    with worker(network, manager, join) as new:
        time.sleep(after_s)
        docker("restart", "--time", STOPS_WITHIN_S, new.name)
        time.sleep(after_s)
        docker("stop", "--time", STOPS_WITHIN_S, new.name)
        assert docker("inspect", "-f", "{{.State.ExitCode}}", new.name).strip() != "137"


@pytest.mark.parametrize("want", ["hold", "purge"])
def test_a_reply_to_hold_or_purge_locks_the_rental_of_its_epoch_only(
    network: WorkerNetwork, manager: SmallManager, join: Path, folder: Path, want: str
) -> None:
    with worker(network, manager, join) as new:
        new.wait_registered()
        rental = new_rental(new, folder)
        rental.epoch = 2
        rental.create_quickly()
        manager.placements = [placement(rental, want, epoch=1)]
        now = time.monotonic()
        wait_until(lambda: len(manager.of("/api/heartbeat", after=now)) > 2, "three heartbeats")
        assert rental.accepts()
        manager.placements = [placement(rental, want)]
        wait_until(lambda: _state(new, rental) == "locked", "locked")
        assert not rental.accepts()


def test_an_agent_waits_for_the_join_token_and_registers_once_it_exists(
    network: WorkerNetwork, manager: SmallManager, folder: Path
) -> None:
    with join_directory(folder, token=None) as join, worker(network, manager, join) as new:
        wait_until(lambda: "waiting for the manager to make the join token" in new.log(), "the agent logs that")
        assert manager.calls == []
        (join / "token").write_text(JOIN_TOKEN)
        new.wait_registered()


def test_sshd_that_dies_is_started_again(network: WorkerNetwork, manager: SmallManager, join: Path) -> None:
    with worker(network, manager, join) as new:
        new.wait_registered()
        new.run("sh", "-c", "kill -9 $(pgrep -o -x sshd)")
        wait_until(lambda: "sshd ended with status -9" in new.log(), "the end of sshd is logged")
        wait_until(lambda: new.ssh("root", new.key, "echo in").stdout == "in\n", "sshd answers again")


def test_a_worker_repeats_its_calls_while_the_manager_is_away_and_logs_no_secret(
    network: WorkerNetwork, manager: SmallManager, join: Path
) -> None:
    for _ in range(2):
        manager.answers.append(("/api/register", 502, {"code": "manager_unreachable"}))
    with worker(network, manager, join) as new:
        new.wait_registered()
        log = new.log()
        assert log.count("registration failed: 502 manager_unreachable") == 2
        assert "j" * 43 not in log
        assert "s" * 43 not in log


def _state(on: Worker, rental: Rental) -> str:
    items = json.loads(on.run("orion-rental", "inventory"))["rentals"]
    return next(item["state"] for item in items if item["rental_id"] == rental.rental_id)
