"""Liveness connections: to which workers, their reports, and the health controller's decisions; the port is a fake."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import asyncssh
import pytest
from orion_worker.agent.decisions import LIVENESS_GRACE_S
from orion_worker.agent.fence import AGAIN_EVERY_S, LOOK_EVERY_S
from support.builders import new_worker
from support.harness import Harness

from orion.manager.domain.health import LivenessReport
from orion.manager.domain.model import Worker
from orion.manager.domain.states import Health
from orion.manager.fakes.workers import FakeLiveness, FakeWorker, FakeWorld
from orion.manager.operations.liveness import PROOFS, LivenessConnections
from orion.manager.ssh.liveness import ATTEMPT_EVERY_S, SILENCE_S, Silence, breaks_silence, closed_by_peer
from orion.manager.ssh.port import Host


class Scene:
    def __init__(self) -> None:
        self.world = FakeWorld()
        self.now = 1000.0
        self.changes = 0
        self.connections = LivenessConnections(FakeLiveness(self.world), lambda: self.now, self._count)
        self.worker = new_worker(health=Health.READY)
        self.node = self.add(self.worker)

    def add(self, worker: Worker) -> FakeWorker:
        node = self.world.add(Host(worker_id=worker.id, address=worker.address, host_keys=worker.host_keys))
        node.boot_id = worker.boot_id
        return node

    async def rest(self) -> LivenessReport:
        for _ in range(10):
            await asyncio.sleep(0)
        return self.connections.report(self.worker)

    def _count(self, worker_id: str) -> None:
        assert worker_id == self.worker.id
        self.changes += 1


@pytest.fixture
async def scene() -> Scene:
    scene = Scene()
    scene.connections.update(scene.worker)
    assert await scene.rest() == LivenessReport()
    return scene


async def test_a_container_that_dies_is_proved_dead(scene: Scene) -> None:
    scene.node.die()
    found = await scene.rest()
    assert (found.closed_at, found.proof) == (1000.0, PROOFS["gone"])
    assert scene.changes >= 1, "the health controller is called"
    await scene.connections.stop()


async def test_a_restarted_sshd_leaves_nothing_behind(scene: Scene) -> None:
    scene.node.close_connections()
    assert await scene.rest() == LivenessReport()
    assert scene.changes == 2, "the connection ended and was opened again"
    await scene.connections.stop()


async def test_another_machine_at_the_address_is_a_proof_too(scene: Scene) -> None:
    other = replace(scene.worker, id="w-other", host_keys=("ssh-ed25519 other",))
    scene.add(other)
    scene.node.die()
    assert (await scene.rest()).proof == PROOFS["replaced"]
    await scene.connections.stop()


async def test_a_liveness_report_about_one_session_of_a_worker_does_not_count_for_the_next(scene: Scene) -> None:
    scene.node.die()
    assert (await scene.rest()).proof
    again = replace(scene.worker, session_id="another", boot_id="boot-0002")
    scene.connections.update(again)
    assert scene.connections.report(again) == LivenessReport()
    await scene.connections.stop()


@pytest.mark.parametrize("change", [{"health": Health.DOWN}, {"session_id": None}])
async def test_a_worker_that_is_down_or_without_a_session_has_no_liveness_connection(change: dict[str, str]) -> None:
    scene = Scene()
    scene.connections.update(replace(scene.worker, **change))  # type: ignore[arg-type]
    assert scene.connections._tasks == {}


async def test_the_liveness_connection_of_a_removed_worker_is_closed(scene: Scene) -> None:
    scene.connections.close("w-another")
    assert scene.connections._tasks
    scene.connections.close(scene.worker.id)
    assert scene.connections._tasks == {}


async def test_a_killed_worker_s_rental_is_taken_over_at_once_and_a_restarted_sshd_causes_no_takeover(
    harness: Harness,
) -> None:
    await harness.hold_liveness_connections()
    first, second = await harness.join(), await harness.join()
    harness.end_the_brake_of_the_start()
    await harness.pass_time(5.0)
    rental = await harness.rent()
    holder = next(a for a in (first, second) if a.worker_id == rental["worker_id"])
    await _rest(harness)

    holder.node.close_connections()
    await _rest(harness)
    assert await harness.health(holder) == "ready"
    assert (await harness.rental(rental["id"]))["epoch"] == 1

    holder.node.die()
    holder.beating = False
    await _rest(harness)
    await harness.settle()
    assert await harness.health(holder) == "down"
    assert (await harness.worker(holder))["explanation"] == PROOFS["gone"]
    other = second if holder is first else first
    assert set(harness.snapshot_service.connected) == {other.worker_id}, (
        "the other worker was chosen before the death was proved"
    )
    moved = await harness.rental(rental["id"])
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert harness.manager.leases.losses(holder.worker_id, harness.clock.now, 3600.0) == 1


async def _rest(harness: Harness) -> None:
    for _ in range(5):
        await harness.settle()
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("ended", "closed"),
    [
        (asyncssh.ConnectionLost("FIN"), True),
        (ConnectionResetError(104, "RST"), True),
        (None, False),
        (TimeoutError(110, "what we sent was never acknowledged"), False),
        (OSError(113, "no route to host"), False),
    ],
)
def test_only_an_end_from_the_worker_s_side_begins_a_proof_of_death(ended: Exception | None, closed: bool) -> None:
    assert closed_by_peer(ended) is closed


def test_a_living_worker_has_frozen_its_rentals_before_its_silence_proves_its_death() -> None:
    """The agent, too, counts silence from the end of the connection: docs/decisions/015-liveness-connection.md."""
    assert LIVENESS_GRACE_S + LOOK_EVERY_S + AGAIN_EVERY_S < SILENCE_S


def test_silence_proves_death_only_after_its_time_and_enough_attempts() -> None:
    silence = Silence(100.0)
    for _ in range(int(SILENCE_S / ATTEMPT_EVERY_S)):
        silence.begun()
    assert not silence.proves(100.0 + SILENCE_S - 0.01)
    assert silence.proves(100.0 + SILENCE_S)
    assert not Silence(100.0, attempts=2).proves(200.0), "no address was tried"


def test_a_death_is_proved_as_soon_as_the_silence_was_long_enough() -> None:
    silence = Silence(100.0)
    assert silence.pause_s(100.0) == ATTEMPT_EVERY_S
    silence.broken(100.01)  # by a refusal of an sshd that was just ending
    assert silence.pause_s(101.25) == ATTEMPT_EVERY_S
    assert silence.pause_s(101.5) == pytest.approx(0.01)
    assert silence.pause_s(100.01 + SILENCE_S) == ATTEMPT_EVERY_S, (
        "there are too few attempts, because it does not spin"
    )


def test_an_answer_of_any_kind_begins_the_silence_anew() -> None:
    silence = Silence(100.0, attempts=9)
    silence.broken(101.0)
    assert not silence.proves(101.0 + SILENCE_S), "new attempts are needed too"


@pytest.mark.parametrize(
    ("outcome", "breaks"),
    [
        (None, True),
        (ConnectionRefusedError(111, "refused"), True),
        (ConnectionResetError(104, "reset"), True),
        (TimeoutError(110, "timed out"), False),
        (OSError(113, "no route to host"), False),
        (OSError(101, "our own network is unreachable"), True),
        (OSError(24, "too many open files"), True),
    ],
)
def test_only_unanswered_attempts_count_as_silence(outcome: OSError | None, breaks: bool) -> None:
    assert breaks_silence(outcome) is breaks
