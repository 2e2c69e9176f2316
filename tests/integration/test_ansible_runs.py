"""The manager's side of the engine: whatever the process does, each job is answered, and in time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_contract import KEY

from orion.manager.ansible.client import AnsibleEngine
from orion.manager.ansible.port import Action, Job, Outcome
from orion.manager.ssh.port import Host
from orion.rental_order import RentalOrder

JOB = Job(
    action=Action.CREATE,
    host=Host(worker_id="w-abcdefgh", address="192.0.2.7", host_keys=(KEY,)),
    order=RentalOrder(rental_id="abcdefghij", username="r-abcdefghij", uid=100_000, epoch=1, public_keys=(KEY,)),
    deadline_s=30.0,
)
RESTARTED = Outcome(ok=False, message="the engine was restarted")

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def process(path: Path, behaviour: Behaviour) -> AsyncIterator[None]:
    """Something that listens where the engine's process would."""
    server = await asyncio.start_unix_server(behaviour, path)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)  # noqa: ASYNC240


def reply(identifier: str, **fields: Any) -> bytes:
    return json.dumps({"id": identifier, "ok": True, **fields}).encode() + b"\n"


async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write(reply(json.loads(line)["id"], report={"epoch": json.loads(line)["order"]["epoch"]}))
    writer.close()


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def end_after_one_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.close()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AnsibleEngine]:
    engine = AnsibleEngine(tmp_path / "engine.sock", margin_s=0.05)
    yield engine
    await engine.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock"


async def test_many_jobs_share_one_connection_and_each_gets_its_own_answer(engine: AnsibleEngine, path: Path) -> None:
    connections = 0

    async def in_reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        requests = [json.loads(await reader.readline()) for _ in range(20)]
        for request in reversed(requests):
            writer.write(reply(request["id"], report={"epoch": request["order"]["epoch"]}))
        await say_nothing(reader, writer)

    async with process(path, in_reverse):
        outcomes = await asyncio.gather(*(engine.run(JOB.with_order(epoch=epoch)) for epoch in range(1, 21)))
    assert [outcome.report["epoch"] for outcome in outcomes] == list(range(1, 21))
    assert connections == 1


async def test_a_job_fails_at_its_deadline_when_the_engine_does_not_answer(engine: AnsibleEngine, path: Path) -> None:
    async with process(path, say_nothing):
        outcome = await engine.run(replace(JOB, deadline_s=0.05))
    assert outcome == Outcome(ok=False, message="the engine did not answer in time")


async def test_a_job_fails_at_its_deadline_when_there_is_no_engine(engine: AnsibleEngine) -> None:
    outcome = await engine.run(replace(JOB, deadline_s=0.05))
    assert outcome == Outcome(ok=False, message="the engine did not answer in time")


async def test_unfinished_jobs_fail_when_the_engine_ends(engine: AnsibleEngine, path: Path) -> None:
    async with process(path, end_after_one_request):
        assert await asyncio.gather(*(engine.run(JOB) for _ in range(3))) == [RESTARTED] * 3


async def test_the_manager_connects_again_to_a_restarted_engine(engine: AnsibleEngine, path: Path) -> None:
    async with process(path, end_after_one_request):
        assert await engine.run(JOB) == RESTARTED
    async with process(path, answer_all):
        assert (await engine.run(JOB)).ok


async def test_a_job_waits_for_an_engine_that_is_starting(engine: AnsibleEngine, path: Path) -> None:
    running = asyncio.create_task(engine.run(JOB))
    await asyncio.sleep(0)
    assert not running.done()
    async with process(path, answer_all):
        assert (await running).ok


@pytest.mark.parametrize("nonsense", [b"nonsense\n", b"{}\n", b"[1]\n", b"x" * (8 << 20)])
async def test_an_invalid_answer_of_the_engine_breaks_only_the_connection(
    engine: AnsibleEngine, path: Path, nonsense: bytes
) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(nonsense)
        await say_nothing(reader, writer)

    async with process(path, babble):
        assert await engine.run(JOB) == RESTARTED


async def test_an_answer_of_the_engine_without_a_waiting_job_is_ignored(engine: AnsibleEngine, path: Path) -> None:
    async def answer_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            writer.write(reply("unknown") + reply(json.loads(line)["id"]) * 2)
        writer.close()

    async with process(path, answer_twice):
        assert [(await engine.run(JOB)).ok for _ in range(3)] == [True] * 3


async def test_a_cancelled_job_does_not_affect_the_others(engine: AnsibleEngine, path: Path) -> None:
    both_asked = asyncio.Event()

    async def answer_the_second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, second = await reader.readline(), await reader.readline()
        both_asked.set()
        writer.write(reply(json.loads(second)["id"]))
        await say_nothing(reader, writer)

    async with process(path, answer_the_second):
        first, second = (asyncio.create_task(engine.run(JOB)) for _ in range(2))
        await both_asked.wait()
        first.cancel()
        assert (await second).ok
        with pytest.raises(asyncio.CancelledError):
            await first


@pytest.mark.parametrize(
    "wrong",
    [
        JOB.with_order(username="root"),
        JOB.with_order(uid=0),
        JOB.with_order(public_keys=('command="id" ' + KEY,)),
        replace(JOB, host=replace(JOB.host, host_keys=())),
        replace(JOB, host=replace(JOB.host, address="-oProxyCommand=id")),
        replace(JOB, deadline_s=0),
    ],
)
async def test_an_invalid_job_is_not_sent_to_the_engine(engine: AnsibleEngine, wrong: Job) -> None:
    outcome = await engine.run(wrong)
    assert not outcome.ok
    assert outcome.message.startswith("not a job for the engine")
