"""Who is in, where, and since when; how many may be; and the end of those whose worker is the rental's no more.

A session that begins is listened for before the rental is looked up, so none outlives a change that came in between.
Beginnings and ends are written down once a second, all in one transaction: who, from where, to which rental, for how
long and how many bytes, and never what. A manager that is killed loses the last second of it, and the ends of what it
carried.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from orion.manager.controllers.loop import Loop
from orion.manager.domain.fair_share import Claim, may_take
from orion.manager.domain.steps import Event
from orion.manager.gateway.relay import LEFT_WORKER, TOKEN_OVER, Ending
from orion.manager.gateway.token_lifetime import TokenUse
from orion.manager.refusals import ApiProblem
from orion.manager.store.database import Store, record

INTERVAL_S = 1.0
MOST_PENDING = 10_000
ENDS = frozenset(f"placement.{state}" for state in ("stopping", "stopped", "failed", "lost", "purged"))
"""Events after which nobody has any business on that worker."""


@dataclass(frozen=True)
class SessionLimits:
    """Sessions at once. Of all, and of the young ones of a worker, an owner of rentals has half at most.

    A young one may not have logged in: sshd of a worker takes 200 of those, and then refuses whoever comes, the manager
    included, for all come from the manager's address.
    """

    of_a_rental: int = 100
    of_all: int = 1000
    young_of_a_rental: int = 50
    young_of_a_worker: int = 150
    young_s: float = 25.0
    """A little more than sshd waits for a log-in (LoginGraceTime)."""


@dataclass(eq=False)
class Session:
    rental_id: str
    began: float
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    who: str = ""
    where_from: str = ""
    owner: str = ""
    worker_id: str = ""
    epoch: int = 0
    also: dict[str, Any] = field(default_factory=dict)
    """What else its events tell."""
    opening: TokenUse = field(default_factory=TokenUse)
    """Says when the token by which it was opened is over."""
    over: asyncio.Future[Ending] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Why its worker is the rental's no more, or its token nobody's."""

    def opened_by(self, opening: TokenUse) -> None:
        """End with the token of this opening."""
        self.opening = opening
        opening.over.add_done_callback(lambda over: self.end(Ending(TOKEN_OVER, over.result())))

    def again(self) -> None:
        """It is about to look its rental up: what ended there before that is no concern of it."""
        self.epoch = 0
        if self.opening.over.done():
            return
        self.over = asyncio.get_running_loop().create_future()

    def end(self, ending: Ending) -> None:
        if not self.over.done():
            self.over.set_result(ending)


class Sessions:
    def __init__(self, store: Store, monotonic: Callable[[], float], limits: SessionLimits | None = None) -> None:
        self._store = store
        self._monotonic = monotonic
        self.limits = limits or SessionLimits()
        self._listening: dict[str, set[Session]] = {}
        """By rental: whoever is in, or about to come in."""
        self._inside: dict[str, set[Session]] = {}
        """By worker."""
        self.inside = 0
        self._taken: Counter[Claim] = Counter()
        """The sessions that are carried, by the owner of their rental."""
        self._pending: deque[Event] = deque(maxlen=MOST_PENDING)
        self._writing = asyncio.Lock()
        self.loop = Loop("sessions", INTERVAL_S, self.flush)
        store.news.follow(self.on_commit)

    @contextmanager
    def beginning(self, rental_id: str) -> Iterator[Session]:
        """From before the rental is looked up until the session has ended."""
        session = Session(rental_id, self._monotonic())
        self._listening.setdefault(rental_id, set()).add(session)
        try:
            yield session
        finally:
            _forget(self._listening, rental_id, session)

    @contextmanager
    def carried(self, session: Session) -> Iterator[None]:
        """While it is relayed to its worker. Raises ApiProblem where there are too many."""
        self._check(session)
        self._inside.setdefault(session.worker_id, set()).add(session)
        self.inside += 1
        self._taken[Claim(session.owner)] += 1
        try:
            yield
        finally:
            self.inside -= 1
            self._taken[Claim(session.owner)] -= 1
            self._taken += Counter()
            _forget(self._inside, session.worker_id, session)

    def on_commit(self, committed: Sequence[Event]) -> None:
        """What was committed: ends the sessions of placements that are over, in the same moment."""
        for event in committed:
            if event.kind not in ENDS or event.rental_id not in self._listening:
                continue
            for session in self._listening[event.rental_id]:
                # One that has not looked yet has epoch 0, and might have looked just before. What ends of another
                # epoch is no concern of it: a placement that was, or one that was made beside it and came to nothing.
                if session.epoch in {0, event.epoch}:
                    session.end(Ending(LEFT_WORKER, event.reason))

    def note_begin(self, session: Session) -> None:
        self._note(session, "rental.session_opened", "let through to its worker", {})

    def note_end(self, session: Session, reason: str, to_worker: int, to_client: int) -> None:
        seconds = round(self._monotonic() - session.began, 3)
        told = {"seconds": seconds, "bytes_to_worker": to_worker, "bytes_to_client": to_client}
        self._note(session, "rental.session_closed", reason or "ended", told)

    async def flush(self) -> None:
        if not self._pending:
            return
        async with self._writing:
            events = list(self._pending)
            self._pending.clear()
            try:
                await self._store.write(record, *events)
            except BaseException:
                self._pending.extendleft(reversed(events))
                raise

    def _note(self, session: Session, kind: str, reason: str, told: dict[str, float]) -> None:
        details = {"session": session.id, "from": session.where_from} | session.also | told
        event = Event(
            kind=kind,
            actor=session.who,
            reason=reason,
            owner=session.owner,
            rental_id=session.rental_id,
            worker_id=session.worker_id,
            epoch=session.epoch,
            details=details,
        )
        self._pending.append(event)

    def _check(self, new: Session) -> None:
        limits, there = self.limits, self._inside.get(new.worker_id, set())
        its, owner = [session for session in there if session.rental_id == new.rental_id], Claim(new.owner)
        young = [session for session in there if new.began - session.began < limits.young_s]
        young_of_its = sum(session.rental_id == new.rental_id for session in young)
        young_of_owners = Counter(Claim(session.owner) for session in young)
        if self.inside >= limits.of_all:
            raise _too_many(f"the platform carries {limits.of_all} sessions, and no more")
        if not may_take(owner, self._taken, limits.of_all):
            raise _too_many(f"the rentals of {new.owner} have {self._taken[owner]} sessions, and may have no more")
        if len(its) >= limits.of_a_rental:
            raise _too_many(f"the rental has {limits.of_a_rental} sessions, and may have no more: end one")
        has_room = may_take(owner, young_of_owners, limits.young_of_a_worker)
        if young_of_its >= limits.young_of_a_rental or not has_room:
            raise _too_many("too many sessions were begun there at once: try again in half a minute")


def _too_many(detail: str) -> ApiProblem:
    return ApiProblem(429, "too_many_sessions", detail, {"Retry-After": "5"})


def _forget(by: dict[str, set[Session]], key: str, session: Session) -> None:
    by[key].discard(session)
    if not by[key]:
        del by[key]
