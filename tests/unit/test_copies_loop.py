"""When a home is first copied where it is now."""

from __future__ import annotations

import asyncio

from orion.manager.domain.model import Event
from orion.manager.engine.fake import FakeWorld
from orion.manager.engine.vault.fake import FakeVault
from orion.manager.loops.copies import JITTER, SPREAD, CopiesLoop, Plan

RENTALS = [f"rental{number}" for number in range(40)]
PLAN = Plan(interval_s=30.0, at_once=len(RENTALS))
STEP_S = 0.5


class Book:
    """Implements what the loop needs of `store.copies.CopyBook`: it notes when the copy of a rental begins."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.epochs: dict[str, int] = {}
        self.begun: dict[str, float] = {}

    async def running(self) -> dict[str, int]:
        return dict(self.epochs)

    async def one(self, rental_id: str) -> None:
        self.begun.setdefault(rental_id, self.now)

    async def over(self, *_: object) -> list[tuple[str, int]]:
        return []


async def _waits(book: Book, loop: CopiesLoop, epoch: int) -> list[float]:
    """For how long each waits that runs at this epoch from now on, of those that are copied within an interval."""
    book.epochs, book.begun, began = dict.fromkeys(RENTALS, epoch), {}, book.now
    while book.now <= began + PLAN.interval_s:
        await _round(loop)
        book.now += STEP_S
    return [at - began for at in book.begun.values()]


async def _nothing_runs(book: Book, loop: CopiesLoop) -> None:
    book.epochs = {}
    book.now += PLAN.interval_s
    await _round(loop)


async def _round(loop: CopiesLoop) -> None:
    await loop.round()
    for _ in range(5):  # what it has begun ends
        await asyncio.sleep(0)


async def test_what_is_let_in_is_copied_at_once_and_again_after_its_first_session() -> None:
    book = Book()
    vault = FakeVault(FakeWorld(), lambda: book.now)
    loop = CopiesLoop(book, vault, PLAN, lambda: 0.0, lambda: book.now, lambda: book.now)  # type: ignore[arg-type]

    async def at_once(kind: str) -> bool:
        book.begun = {}
        loop.hear([Event(kind, "", "", rental_id="one", epoch=book.epochs["one"])])
        await _round(loop)
        return bool(book.begun)

    async def much_later(epoch: int) -> None:
        await _nothing_runs(book, loop)
        book.epochs = {"one": epoch}
        await _round(loop)

    await _round(loop)
    book.epochs = {"one": 1}
    assert await at_once("rental.activated")
    assert not await at_once("rental.session_opened")
    assert await at_once("rental.session_closed")
    assert not await at_once("rental.session_closed"), "by then it is copied every so often"
    await much_later(2)
    assert not await at_once("rental.activated"), "it is as its copy is: others may still be restored"
    assert await at_once("rental.session_closed")
    assert await at_once("rental.started_empty")
    await loop.stop()


async def test_what_a_takeover_has_just_restored_is_not_copied_while_others_are_restored() -> None:
    book = Book()
    vault = FakeVault(FakeWorld(), lambda: book.now)
    loop = CopiesLoop(book, vault, PLAN, lambda: 0.0, lambda: book.now, lambda: book.now)  # type: ignore[arg-type]
    soon = PLAN.interval_s * JITTER + STEP_S
    at_first = await _waits(book, loop, 1)
    assert len(at_first) == len(RENTALS)
    assert max(at_first) <= soon
    await _nothing_runs(book, loop)
    taken_over = await _waits(book, loop, 2)
    assert len(taken_over) == len(RENTALS)
    assert min(taken_over) >= PLAN.interval_s * (1 - SPREAD)
    await _nothing_runs(book, loop)
    where_it_was = await _waits(book, loop, 2)
    assert len(where_it_was) == len(RENTALS)
    assert max(where_it_was) <= soon, "it is older by now than a copy may be"
    await loop.stop()
