"""The agent's calls, with a fake manager and clock; the node below it is the real one, in a directory."""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from orion_worker.agent.call_home import EVACUATING_INTERVAL_S, EVACUATING_PATIENCE_S, Call, HomeCaller, post_by_http
from orion_worker.agent.decisions import Answer
from orion_worker.agent.main import call_for_ever, exit_in_order
from orion_worker.agent.node import AgentSettings, Node
from orion_worker.records import RentalRecord
from orion_worker.rental.commands import Rentals
from orion_worker.rental.paths import WorkerPaths
from support.builders import host_key
from support.scripted_platform import ScriptedPlatform

from orion.rental_order import RentalOrder
from orion.wire import HeartbeatRequest, RegisterRequest

JOIN = "orion_join_join_secret"
KEY = host_key(1)


@dataclass
class FakeManager:
    """A manager that gives the scripted answers; time passes before each."""

    answers: deque[Answer] = field(default_factory=deque)
    calls: list[tuple[str, str, dict[str, Any], float]] = field(default_factory=list)
    now: float = 1000.0
    thinks_s: float = 2.0

    def post(self, call: Call) -> Answer:
        self.calls.append((call.path, call.token, call.body, call.timeout_s))
        self.now += self.thinks_s
        return self.answers.popleft()

    def clock(self) -> float:
        return self.now


@dataclass
class CallHomeBench:
    root: Path
    manager: FakeManager
    node: Node
    home: HomeCaller
    log: list[str]

    def step(self, *answers: Answer) -> float:
        self.manager.answers.extend(answers)
        return self.home.step()

    @property
    def identity(self) -> Path:
        return self.root / "var/lib/orion/agent/identity.json"

    @property
    def last(self) -> tuple[str, str, dict[str, Any], float]:
        return self.manager.calls[-1]


@pytest.fixture
def bench(tmp_path: Path) -> CallHomeBench:
    (tmp_path / "etc/ssh").mkdir(parents=True)
    (tmp_path / "etc/ssh/ssh_host_ed25519_key.pub").write_text(f"{KEY} root@here\n")
    join = tmp_path / "run/orion-join/token"
    join.parent.mkdir(parents=True)
    join.write_text(f"{JOIN}\n")
    log: list[str] = []
    node = Node(AgentSettings(url="http://manager", app_address="172.20.0.3"), log.append, tmp_path)
    manager = FakeManager()
    home = HomeCaller(node=node, post=manager.post, clock=manager.clock, chance=lambda: 1.0, say=log.append)
    return CallHomeBench(tmp_path, manager, node, home, log)


def registered(worker_id: str = "w-abcdefgh", placements: list[dict[str, Any]] | None = None) -> Answer:
    body = {
        "worker_id": worker_id,
        "worker_token": f"orion_worker_{worker_id}_s",
        "session_id": "session-1234",
        "heartbeat_interval_s": 30,
        "lease_s": 75,
        "door_answer_s": 5,
        "authorized_keys": [KEY],
        "placements": placements or [],
    }
    return Answer(status=201, body=body)


def acknowledged(next_s: float = 30, placements: list[dict[str, Any]] | None = None) -> Answer:
    return Answer(
        status=200, body={"lease_s": 75, "door_answer_s": 5, "next_heartbeat_s": next_s, "placements": placements or []}
    )


def a_rental(bench: CallHomeBench, epoch: int = 1) -> Rentals:
    """Make a locked rental, without its account, which only root can make."""
    rentals = Rentals(WorkerPaths(bench.root))
    rentals.records.save(RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=epoch))
    (bench.root / "etc/orion/locked/r-one").write_text("key\n")
    return rentals


def test_the_first_call_registers_with_the_join_token_and_keeps_the_identity(bench: CallHomeBench) -> None:
    assert bench.step(registered()) == 30
    path, token, body, timeout_s = bench.last
    assert (path, token, timeout_s) == ("/api/register", JOIN, 5.0)
    assert RegisterRequest.model_validate(body).ssh_host_keys == [KEY]
    assert json.loads(bench.identity.read_text())["worker_id"] == "w-abcdefgh"
    assert bench.identity.stat().st_mode & 0o777 == 0o600
    assert (bench.root / "etc/orion/keys/root").read_text() == f'from="172.20.0.3" {KEY}\n'


def test_every_heartbeat_has_the_agreed_form_and_the_interval_of_the_last_reply(bench: CallHomeBench) -> None:
    bench.step(registered())
    assert bench.step(acknowledged(next_s=7.5)) == 7.5
    assert bench.step(acknowledged(next_s=31)) == 31
    path, token, body, _ = bench.last
    assert (path, token) == ("/api/heartbeat", "orion_worker_w-abcdefgh_s")
    beat = HeartbeatRequest.model_validate(body)
    assert (beat.session_id, beat.seq, beat.leaving) == ("session-1234", 2, False)


def test_the_lease_runs_from_the_sending_of_the_last_acknowledged_call(bench: CallHomeBench) -> None:
    bench.step(registered())
    assert bench.home.lease.acknowledged_at == 1000.0
    bench.step(acknowledged())
    assert bench.home.lease.acknowledged_at == 1002.0
    for silent in (Answer(status=0), Answer(status=429), Answer(status=502, marked=True), Answer(status=403)):
        bench.step(silent)
        assert bench.home.lease.acknowledged_at == 1002.0


def test_only_a_last_answer_marked_by_the_proxy_excuses_a_worker_without_a_lease(bench: CallHomeBench) -> None:
    bench.step(registered())
    bench.step(Answer(status=502, marked=True))
    assert bench.home.lease.unreached_at == 1002.0, "the time at which it called"
    for other in (
        Answer(status=0),
        Answer(status=429),
        Answer(status=403),
        Answer(status=502, body={"code": "manager_unreachable"}),
        Answer(status=503),
    ):
        bench.step(Answer(status=502, marked=True))
        bench.step(other)
        assert bench.home.lease.unreached_at is None, other


def test_the_orders_of_a_reply_that_was_read_after_its_lease_are_not_carried_out(bench: CallHomeBench) -> None:
    a_rental(bench)
    bench.step(registered())
    bench.manager.thinks_s = 80.0  # as if the machine slept while the reply was on its way
    bench.step(acknowledged(placements=[{"rental_id": "one", "epoch": 1, "want": "run"}]))
    assert bench.node.inventory()[0]["state"] == "locked"


def test_the_next_call_is_due_at_once_when_the_liveness_connection_has_ended(bench: CallHomeBench) -> None:
    bench.step(registered())
    assert bench.home.due_s() > 60.0
    bench.home.liveness_ended_at = bench.manager.now
    assert bench.home.due_s() == 0.25
    bench.manager.now += 0.3
    bench.step(acknowledged())
    assert bench.home.due_s() > 60.0


def test_after_an_orderly_end_of_the_manager_the_agent_calls_until_the_next_one_answers(bench: CallHomeBench) -> None:
    bench.step(registered())
    bench.home.liveness_closed_at = bench.manager.now
    bench.manager.now += 1.5
    assert [bench.step(Answer(status=503)) for _ in range(3)] == [1.0, 2.0, 2.0]
    bench.step(acknowledged())
    assert bench.home.due_s() > 60.0


def test_a_worker_whose_lease_is_about_to_end_calls_every_two_seconds(bench: CallHomeBench) -> None:
    bench.step(registered())
    bench.manager.now += 70.0
    assert [bench.step(Answer(status=503)) for _ in range(4)] == [1.0, 2.0, 2.0, 2.0]


def test_without_a_join_token_the_agent_waits_logs_that_once_and_makes_no_call(bench: CallHomeBench) -> None:
    token = bench.root / "run/orion-join/token"
    token.unlink()
    assert [bench.step() for _ in range(3)] == [1.0, 1.0, 1.0]
    assert bench.manager.calls == []
    assert len(bench.log) == 1
    token.write_text(JOIN)
    assert bench.step(registered()) == 30


def test_failed_registrations_are_repeated_for_ever_at_growing_intervals_with_one_log_line_each(
    bench: CallHomeBench,
) -> None:
    waits = [bench.step(Answer(status=503)) for _ in range(8)]
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert len(bench.log) == 8
    assert bench.step(registered()) == 30
    bench.step(Answer(status=409, body={"code": "stale_session"}))
    assert bench.step(Answer(status=502)) == 1, "the count of failures began anew"


@pytest.mark.parametrize("nobody", [Answer(status=0, reason="refused"), Answer(status=502, marked=True)])
def test_a_manager_that_does_not_run_yet_is_called_every_few_seconds(bench: CallHomeBench, nobody: Answer) -> None:
    assert [bench.step(nobody) for _ in range(5)] == [1, 2, 3, 3, 3]


def test_a_failed_heartbeat_is_tried_again_soon_and_the_session_is_kept(bench: CallHomeBench) -> None:
    bench.step(registered())
    assert [bench.step(Answer(status=0, reason="timed out")) for _ in range(5)] == [1, 2, 3, 3, 3]
    assert bench.step(acknowledged()) == 30
    assert bench.log[-1] == "heartbeat acknowledged again after 5 failures"
    assert [call[0] for call in bench.manager.calls].count("/api/register") == 1


def test_retry_after_is_obeyed(bench: CallHomeBench) -> None:
    assert bench.step(Answer(status=429, body={"code": "rate_limited"}, retry_after_s=12.0)) == 12.0


def test_a_stale_session_registers_again_at_once_with_its_own_token(bench: CallHomeBench) -> None:
    bench.step(registered())
    assert bench.step(Answer(status=409, body={"code": "stale_session"})) == 0.0
    bench.step(registered())
    assert bench.last[:2] == ("/api/register", "orion_worker_w-abcdefgh_s")


@pytest.mark.parametrize("refusal", [Answer(status=401), Answer(status=409, body={"code": "host_key_changed"})])
def test_a_refused_identity_is_forgotten_and_the_agent_registers_with_the_join_token(
    bench: CallHomeBench, refusal: Answer
) -> None:
    bench.step(registered())
    bench.step(Answer(status=401))
    assert bench.step(refusal) == 0.0
    assert not bench.identity.exists()
    bench.step(registered("w-bbbbbbbb"))
    assert bench.last[:2] == ("/api/register", JOIN)
    assert json.loads(bench.identity.read_text())["worker_id"] == "w-bbbbbbbb"


def test_an_address_in_use_keeps_the_identity_and_tries_later(bench: CallHomeBench) -> None:
    bench.step(registered())
    bench.step(Answer(status=409, body={"code": "stale_session"}))
    assert bench.step(Answer(status=409, body={"code": "address_in_use"})) == 1.0
    assert bench.identity.exists()


@pytest.mark.parametrize("broken", [{}, {"next_heartbeat_s": 0, "placements": []}, {"next_heartbeat_s": 30}])
def test_a_reply_of_another_form_renews_nothing(bench: CallHomeBench, broken: dict[str, Any]) -> None:
    bench.step(registered())
    assert bench.step(Answer(status=200, body=broken)) == 1.0
    assert bench.home.lease.acknowledged_at == 1000.0


def test_a_half_written_identity_is_no_identity(bench: CallHomeBench) -> None:
    bench.identity.write_text('{"worker_tok')
    bench.step(registered())
    assert bench.last[1] == JOIN


def test_replies_unlock_and_lock_the_rentals_of_the_worker(bench: CallHomeBench) -> None:
    a_rental(bench)
    run = [{"rental_id": "one", "epoch": 1, "want": "run"}]
    bench.step(registered(placements=run))
    assert bench.node.inventory()[0]["state"] == "running"
    bench.step(acknowledged(placements=[{"rental_id": "one", "epoch": 1, "want": "hold"}]))
    assert bench.node.inventory()[0]["state"] == "locked"
    assert bench.log[-2:] == ["unlocked rental one at epoch 1", "locked rental one at epoch 1"]


def test_once_a_worker_is_exiting_no_reply_activates_a_rental(bench: CallHomeBench) -> None:
    rentals = a_rental(bench)
    bench.step(registered())
    rentals.unlock(RentalOrder(rental_id="one", epoch=1))
    bench.home.begin_exit()
    assert bench.node.inventory()[0]["state"] == "locked"
    bench.step(acknowledged(placements=[{"rental_id": "one", "epoch": 1, "want": "run"}]))
    assert bench.node.inventory()[0]["state"] == "locked"


def test_an_evacuating_worker_calls_often_until_it_is_empty(bench: CallHomeBench) -> None:
    rentals = a_rental(bench)
    bench.step(registered())
    assert not bench.home.is_evacuating()
    bench.home.evacuate()
    assert bench.home.due_s() == EVACUATING_INTERVAL_S
    assert (
        bench.step(acknowledged(placements=[{"rental_id": "one", "epoch": 1, "want": "run"}])) == EVACUATING_INTERVAL_S
    )
    assert HeartbeatRequest.model_validate(bench.last[2]).vacating
    assert bench.node.inventory()[0]["state"] == "running", "the rental goes on until it is migrated"
    assert bench.home.is_evacuating()
    rentals.records.bury(RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=1))
    assert not bench.home.is_evacuating()
    bench.manager.answers.append(acknowledged())
    bench.home.say_goodbye()
    assert "vacating" not in bench.last[2]


def test_an_evacuating_worker_does_not_wait_for_a_manager_that_does_not_answer(bench: CallHomeBench) -> None:
    a_rental(bench)
    bench.home.evacuate()
    assert not bench.home.is_evacuating(), "the worker never registered"
    bench.step(registered())
    for answer in (Answer(status=0), Answer(status=422)):
        assert bench.home.is_evacuating()
        bench.step(answer)
    assert bench.manager.now - 1000.0 >= EVACUATING_PATIENCE_S
    assert not bench.home.is_evacuating()


def test_the_goodbye_is_a_last_heartbeat_in_three_seconds_at_most(bench: CallHomeBench) -> None:
    bench.home.say_goodbye()
    assert bench.manager.calls == [], "a worker that never registered says no goodbye"
    bench.step(registered())
    bench.manager.answers.append(Answer(status=0, reason="timed out"))
    bench.home.say_goodbye()
    path, _, body, timeout_s = bench.last
    assert (path, body["leaving"], timeout_s) == ("/api/heartbeat", True, 3.0)


def test_a_locked_rental_does_not_delay_the_heartbeat(bench: CallHomeBench) -> None:
    rentals = a_rental(bench)
    run = [{"rental_id": "one", "epoch": 1, "want": "run"}]
    bench.step(registered())
    with rentals.records.locked("one", wait_s=0):
        assert bench.step(acknowledged(placements=run)) == 30
    assert bench.node.inventory()[0]["state"] == "locked"
    assert "another command for this rental" in bench.log[-1]
    bench.step(acknowledged(placements=run))
    assert bench.node.inventory()[0]["state"] == "running"


def test_no_line_of_the_log_holds_a_token(bench: CallHomeBench) -> None:
    bench.step(Answer(status=502, body={"detail": "away"}))
    bench.step(registered())
    bench.step(Answer(status=401))
    bench.step(Answer(status=401))
    text = "\n".join(bench.log)
    assert JOIN not in text
    assert "orion_worker" not in text


ENDED = {"rental_id": "one", "epoch": 1, "run": "1@boot", "how": "status 3", "ago_s": 5.0}


def of_a_manager_that_takes_ends(*more: str) -> Answer:
    return Answer(status=200, body={**acknowledged().body, "takes": ["start_ends", *more]})


@pytest.fixture
def ended(bench: CallHomeBench, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the end of a start command that ran here, in the form of a heartbeat."""
    a_rental(bench)
    monkeypatch.setattr(bench.node.rentals.launcher, "ended", lambda *_: ENDED)
    return ENDED


def test_a_manager_that_takes_start_ends_gets_them(bench: CallHomeBench, ended: dict[str, Any]) -> None:
    bench.step(registered())
    bench.step(of_a_manager_that_takes_ends("what nobody has heard of"))
    assert "start_ends" not in bench.last[2], "the manager had not said so yet"
    bench.step(of_a_manager_that_takes_ends())
    assert bench.last[2]["start_ends"] == [ended]
    (end,) = HeartbeatRequest.model_validate(bench.last[2]).start_ends
    assert end.model_dump() == ended


@pytest.mark.parametrize("takes", [None, "start_ends", 7, [["start_ends"]], {"start_ends": True}])
def test_an_older_manager_gets_no_field_that_it_would_refuse(
    bench: CallHomeBench, ended: dict[str, Any], takes: Any
) -> None:
    bench.step(registered())
    for _ in range(3):
        bench.step(Answer(status=200, body=acknowledged().body | ({} if takes is None else {"takes": takes})))
        assert "start_ends" not in bench.last[2]


@pytest.mark.parametrize(
    "refusal", [Answer(status=422, body={"code": "invalid_request"}), Answer(status=502, marked=True), Answer(status=0)]
)
def test_a_heartbeat_after_a_failed_one_has_no_optional_field(
    bench: CallHomeBench, ended: dict[str, Any], refusal: Answer
) -> None:
    """The manager may have been replaced by an older one meanwhile, and the lease runs."""
    bench.step(registered())
    bench.step(of_a_manager_that_takes_ends())
    bench.step(refusal)
    assert "start_ends" in bench.last[2]
    bench.step(acknowledged())
    assert "start_ends" not in bench.last[2]


def test_a_heartbeat_has_no_more_start_ends_than_it_may(bench: CallHomeBench, ended: dict[str, Any]) -> None:
    records = [
        RentalRecord(rental_id=f"r{number}", username=f"r-{number}", uid=100_001 + number, epoch=1)
        for number in range(300)
    ]
    for record in records:
        bench.node.rentals.records.save(record)
    assert len(bench.node.start_ends()) == 256


def test_a_name_that_leads_to_an_ipv6_address_as_well_is_called_by_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's names lead to both where a network has both, and the packet filter drops IPv6."""
    platform = ScriptedPlatform()
    platform.answer("POST", "/api/heartbeat", {"heard": True})
    port = int(platform.url.rsplit(":", 1)[1])
    tcp = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    found = [(socket.AF_INET6, *tcp, ("::1", port, 0, 0)), (socket.AF_INET, *tcp, ("127.0.0.1", port))]
    try:
        with socket.create_server(("::1", port), family=socket.AF_INET6) as ipv6:
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
            answer = post_by_http(
                f"http://manager_proxy:{port}", Call(path="/api/heartbeat", token=JOIN, body={}, timeout_s=60.0)
            )
            ipv6.settimeout(0.05)
            with pytest.raises(TimeoutError):
                ipv6.accept()
    finally:
        platform.stop()
    assert (answer.status, answer.body) == (200, {"heard": True})


def test_a_worker_that_stops_during_its_registration_keeps_its_identity_and_says_goodbye(
    bench: CallHomeBench,
) -> None:
    asked, locked = threading.Event(), threading.Event()
    calls: list[dict[str, Any]] = []

    class SlowManager(FakeManager):
        def post(self, call: Call) -> Answer:
            calls.append(call.body)
            asked.set()
            assert locked.wait(60)
            return registered() if call.path == "/api/register" else acknowledged()

    def lock_all(kill: bool = False) -> None:
        locked.set()

    bench.node.lock_all = lock_all  # type: ignore[method-assign]
    manager = SlowManager()
    home = HomeCaller(node=bench.node, post=manager.post, clock=manager.clock, chance=lambda: 1.0, say=bench.log.append)
    stopping, hurry = threading.Event(), threading.Event()
    calling = threading.Thread(target=call_for_ever, args=(home, stopping, hurry), daemon=True)
    calling.start()
    assert asked.wait(60)
    stopping.set()
    hurry.set()
    exit_in_order(home, calling)
    assert json.loads(bench.identity.read_text())["worker_id"] == "w-abcdefgh"
    assert calls[-1]["leaving"] is True
