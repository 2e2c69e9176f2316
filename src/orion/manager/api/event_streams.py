"""Live streams of events: each new event is read once from the database and offered to the streams that may show it.

A stream first reads older events, page by page, and then takes the events that are offered. A stream whose client reads
too slowly is dropped; the client connects again and resumes from its last event (Last-Event-ID).
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from orion import wire
from orion.manager.api import views
from orion.manager.domain.steps import Event
from orion.manager.refusals import ApiProblem
from orion.manager.store import events
from orion.manager.store.database import Row, Store

MAX_STREAMS_PER_TOKEN = 10
"""Open streams per token."""
MAX_WAITING_EVENTS = 1000
"""Events that may wait for the client of one stream."""
COMMENT_AFTER_S = 15.0
"""Seconds without an event after which a comment is sent, so that no client takes the stream for dead."""
RETRY_AFTER_S = 1.0
"""Seconds until events are read again after an error."""
log = structlog.get_logger()


@dataclass(frozen=True)
class Filter:
    """The events that a stream shows; None matches every value."""

    owner: str | None = None
    rental_id: str | None = None
    worker_id: str | None = None

    def shows(self, row: Row) -> bool:
        """Return whether the stream shows this row of the table of events."""
        wanted = (("owner", self.owner), ("rental_id", self.rental_id), ("worker_id", self.worker_id))
        return all(value is None or row[name] == value for name, value in wanted)


@dataclass(eq=False, kw_only=True)
class _Stream:
    filter: Filter
    waiting: deque[tuple[int, str]] = field(default_factory=deque)
    """The events that were offered and not yet sent, each with its id."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_dropped: bool = False

    def offer(self, number: int, text: str) -> None:
        if len(self.waiting) >= MAX_WAITING_EVENTS:
            self.drop()
        elif not self.is_dropped:
            self.waiting.append((number, text))
            self.changed.set()

    def drop(self) -> None:
        """End the stream; its client connects again and resumes after its last event."""
        self.is_dropped = True
        self.waiting.clear()
        self.changed.set()


class EventStreams:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._streams: set[_Stream] = set()
        self._of_tokens: Counter[str] = Counter()
        self._last = 0
        """The id of the newest event that was offered."""
        self._is_new = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        store.news.follow(self.on_commit)

    def on_commit(self, committed: Sequence[Event]) -> None:
        """Wake the task that offers new events to the streams."""
        if committed:
            self._is_new.set()

    @contextmanager
    def counted(self, token_id: str) -> Iterator[None]:
        """Count one open stream of a token during the block. Raise ApiProblem if the token has too many."""
        if self._of_tokens[token_id] >= MAX_STREAMS_PER_TOKEN:
            detail = f"this token has {MAX_STREAMS_PER_TOKEN} open event streams, which is the limit: close one first"
            raise ApiProblem(429, "too_many_streams", detail, headers={"Retry-After": "5"})
        self._of_tokens[token_id] += 1
        try:
            yield
        finally:
            self._of_tokens[token_id] -= 1
            self._of_tokens += Counter()

    async def lines(self, shown: Filter, after: int) -> AsyncIterator[str]:
        """Yield the events with an id above `after` as server-sent events, then new ones, until it is dropped."""
        stream = _Stream(filter=shown)
        await self._add(stream)
        try:
            last, more = after, True
            while more:
                page = await self._store.read(
                    events.page, shown.owner, shown.rental_id, shown.worker_id, last, wire.MAX_PAGE
                )
                more = len(page) >= wire.MAX_PAGE
                for row in page:
                    last = row["id"]
                    yield _text(row)
            while not stream.is_dropped:
                stream.changed.clear()
                while stream.waiting:
                    number, text = stream.waiting.popleft()
                    if number > last:
                        last = number
                        yield text
                try:
                    async with asyncio.timeout(COMMENT_AFTER_S):
                        await stream.changed.wait()
                except TimeoutError:
                    yield ": nothing new\n\n"
        finally:
            self._streams.discard(stream)

    async def stop(self) -> None:
        if self._reading:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _add(self, stream: _Stream) -> None:
        """Offer to this stream all events that are committed from now on."""
        if not self._streams:
            last = await self._store.read(events.last)
            if not self._streams:  # a stream that was added meanwhile must not miss what was committed since
                self._last = max(self._last, last)
        self._streams.add(stream)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._offer_new_events())

    async def _offer_new_events(self) -> None:
        while self._streams:
            self._is_new.clear()
            try:
                rows = await self._store.read(events.page, None, None, None, self._last, wire.MAX_PAGE)
            except Exception:
                log.exception("events cannot be read; trying again", again_after_s=RETRY_AFTER_S)
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            for row in rows:
                self._offer(row)
            if len(rows) < wire.MAX_PAGE:
                await self._is_new.wait()

    def _offer(self, row: Row) -> None:
        readers = [stream for stream in self._streams if stream.filter.shows(row)]
        self._last = max(self._last, row["id"])
        if not readers or row["kind"] == events.MISSED:
            return
        try:
            text = _text(row)
        except ValueError:
            log.exception("an event cannot be shown", id=row["id"])
            for stream in readers:
                stream.drop()
            return
        for stream in readers:
            stream.offer(row["id"], text)


def _text(row: Row) -> str:
    return f"id: {row['id']}\nevent: {row['kind']}\ndata: {views.event(row).model_dump_json()}\n\n"
