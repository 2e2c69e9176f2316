"""Streams of events: which reads of the database they cost, and which events each one gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from orion import wire
from orion.manager.api import event_streams
from orion.manager.api.event_streams import MAX_STREAMS_PER_TOKEN, EventStreams, Filter
from orion.manager.domain.steps import Event
from orion.manager.refusals import ApiProblem
from orion.manager.store import events
from orion.manager.store.database import Store, record


class Counted(Store):
    """A store that counts all reads, and those of pages of events."""

    reads = 0
    pages = 0

    async def read(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.reads += 1
        self.pages += function is events.page
        return await super().read(function, *args, **kwargs)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Counted]:
    made = Counted(f"sqlite:///{tmp_path}/orion.db")
    made.migrate()
    yield made
    made.close()


async def say(store: Store, *kinds: str, owner: str = "alice", rental_id: str = "one") -> None:
    for kind in kinds:
        await store.write(
            record, Event(kind=kind, actor="somebody", reason="because", owner=owner, rental_id=rental_id)
        )


class Reader:
    """A client of a stream, which may stop reading."""

    def __init__(self, streams: EventStreams, shown: Filter, after: int = 0) -> None:
        self.kinds: list[str] = []
        self.takes = asyncio.Event()
        self.takes.set()
        self._streams, self._shown, self._after = streams, shown, after

    async def read(self) -> None:
        async with aclosing(self._streams.lines(self._shown, self._after)) as lines:  # type: ignore[type-var]
            async for line in lines:
                self.kinds += [part.removeprefix("event: ") for part in line.splitlines() if part.startswith("event: ")]
                await self.takes.wait()


@asynccontextmanager
async def reading(*readers: Reader) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(reader.read()) for reader in readers]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_read(*readers: Reader, kinds: list[str]) -> None:
    async with asyncio.timeout(60):
        for reader in readers:
            while reader.kinds[-len(kinds) :] != kinds:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def until_all_have_looked(store: Counted, readers: int) -> None:
    """Wait until each reader, and the task that distributes events, has seen all earlier events."""
    async with asyncio.timeout(60):
        while store.pages <= readers:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_commit_is_read_once_for_all_streams_and_sent_to_the_permitted_ones(store: Counted) -> None:
    streams = EventStreams(store)
    await say(store, "before")
    alice = [Reader(streams, Filter("alice")) for _ in range(20)]
    others = [Reader(streams, Filter("bob")), Reader(streams, Filter(rental_id="two"))]
    everything = Reader(streams, Filter())
    async with reading(*alice, *others, everything):
        await until_read(*alice, everything, kinds=["before"])
        await until_all_have_looked(store, len(alice) + len(others) + 1)
        before = store.reads
        await say(store, "first")
        await until_read(*alice, everything, kinds=["before", "first"])
        await say(store, "second", owner="bob", rental_id="two")
        await until_read(*others, kinds=["second"])
        await until_read(everything, kinds=["before", "first", "second"])
        assert store.reads - before == 2, "there is one read for each commit"
        assert [reader.kinds for reader in alice] == [["before", "first"]] * len(alice)
    await streams.stop()


async def test_a_stream_that_begins_during_commits_loses_and_repeats_no_event(store: Counted) -> None:
    streams = EventStreams(store)
    first = Reader(streams, Filter())
    async with reading(first):
        for number in range(wire.MAX_PAGE + 50):
            await say(store, f"kind-{number}")
            if number == 20:
                second = Reader(streams, Filter("alice"))
                last = asyncio.create_task(second.read())
        third = Reader(streams, Filter(), after=10)
        kinds = [f"kind-{number}" for number in range(wire.MAX_PAGE + 50)]
        async with reading(third):
            await say(store, "end")
            await until_read(first, second, third, kinds=["end"])
            assert first.kinds == second.kinds == [*kinds, "end"]
            assert third.kinds == [*kinds[10:], "end"]
        last.cancel()
    await streams.stop()


async def test_a_client_that_stops_reading_is_dropped_and_resumes_after_its_last_event(
    store: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_streams, "MAX_WAITING_EVENTS", 5)
    streams = EventStreams(store)
    slow, quick = Reader(streams, Filter()), Reader(streams, Filter())
    async with reading(slow, quick) as (task, _):
        await say(store, "first")
        await until_read(slow, quick, kinds=["first"])
        slow.takes.clear()
        kinds = [f"kind-{number}" for number in range(20)]
        for kind in kinds:
            await say(store, kind)
            await until_read(quick, kinds=[kind])
        slow.takes.set()
        async with asyncio.timeout(60):
            await task
        has = len(slow.kinds)
        again = Reader(streams, Filter(), after=has)
        async with reading(again):
            await until_read(again, kinds=["kind-19"])
            assert slow.kinds + again.kinds == quick.kinds == ["first", *kinds]
    await streams.stop()


async def test_a_token_has_a_limited_number_of_streams_and_ended_streams_free_their_places(store: Counted) -> None:
    streams = EventStreams(store)
    places = [streams.counted("t-one") for _ in range(MAX_STREAMS_PER_TOKEN)]
    for place in places:
        place.__enter__()
    with pytest.raises(ApiProblem) as refused, streams.counted("t-one"):
        pass
    assert (refused.value.status, refused.value.code) == (429, "too_many_streams")
    with streams.counted("t-two"):
        pass
    places[0].__exit__(None, None, None)
    with streams.counted("t-one"):
        pass
