"""The open sessions: their record, their limits, and their end when the rental leaves the worker.

A session is registered before its rental is read, so it misses no change that is committed in between. Events of
beginnings and ends are written once a second in one transaction. A manager that is killed loses the last second of
these, and the ends of its open sessions.
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
"""The kinds of events after which the rental has left that worker."""


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """The limits of open sessions. One owner's rentals may have half of all, and half of a worker's young ones.

    A young session may not have logged in yet. A worker's sshd accepts 200 such connections from one address, and all
    come from the manager's: beyond them it would refuse the manager itself.
    """

    of_a_rental: int = 100
    of_all: int = 1000
    young_of_a_rental: int = 50
    young_of_a_worker: int = 150
    young_s: float = 25.0
    """The seconds for which a session is young: a little more than sshd's LoginGraceTime."""


@dataclass(eq=False, kw_only=True)
class Session:
    rental_id: str
    began: float
    """Monotonic seconds."""
    actor: str
    details: dict[str, Any]
    """The details of its events: the address that it comes `from`, and what it is opened `by` if that is not ssh."""
    token_use: TokenUse
    """The use of the token that opened it."""
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    owner: str = ""
    worker_id: str = ""
    epoch: int = 0
    over: asyncio.Future[Ending] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """A future that is done when the rental has left the worker or the token is over; its result says why."""

    def __post_init__(self) -> None:
        self.token_use.over.add_done_callback(lambda over: self.end(Ending(TOKEN_OVER, over.result())))

    def before_lookup(self) -> None:
        """Forget an ending of a former placement, because the rental is about to be read again."""
        self.epoch = 0
        if not self.token_use.over.done():
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
        """The sessions that are open or about to be, by rental."""
        self._inside: dict[str, set[Session]] = {}
        """The open sessions, by worker."""
        self.inside = 0
        """The number of open sessions."""
        self._taken: Counter[Claim] = Counter()
        """The number of open sessions, by the owner of the rental."""
        self._pending: deque[Event] = deque(maxlen=MOST_PENDING)
        self._writing = asyncio.Lock()
        self.loop = Loop("sessions", INTERVAL_S, self.flush)
        store.news.follow(self.on_commit)

    @contextmanager
    def registered(self, rental_id: str, actor: str, token_use: TokenUse, details: dict[str, Any]) -> Iterator[Session]:
        """Yield a new session, which the use of its token and events of its rental end.

        Enter this before the rental is read.
        """
        began = self._monotonic()
        session = Session(rental_id=rental_id, began=began, actor=actor, details=details, token_use=token_use)
        self._listening.setdefault(rental_id, set()).add(session)
        try:
            yield session
        finally:
            _forget(self._listening, rental_id, session)

    @contextmanager
    def counted(self, session: Session) -> Iterator[None]:
        """Count the session as open during the block. Raise ApiProblem if there are too many."""
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
        """End the sessions of the placements that these events end."""
        for event in committed:
            if event.kind not in ENDS or event.rental_id not in self._listening:
                continue
            for session in self._listening[event.rental_id]:
                # A session with epoch 0 may have read its rental just before this commit. A placement of another epoch
                # is a former one, or the target of a migration that failed.
                if session.epoch in {0, event.epoch}:
                    session.end(Ending(LEFT_WORKER, event.reason))

    def note_begin(self, session: Session) -> None:
        self._note(session, "rental.session_opened", "connected to its worker", {})

    def note_end(self, session: Session, reason: str, to_worker: int, to_client: int) -> None:
        seconds = round(self._monotonic() - session.began, 3)
        figures = {"seconds": seconds, "bytes_to_worker": to_worker, "bytes_to_client": to_client}
        self._note(session, "rental.session_closed", reason or "ended", figures)

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

    def _note(self, session: Session, kind: str, reason: str, figures: dict[str, float]) -> None:
        details = {"session": session.id} | session.details | figures
        event = Event(
            kind=kind,
            actor=session.actor,
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
            raise _too_many(f"the platform has {limits.of_all} open sessions, which is its limit: try again later")
        if not may_take(owner, self._taken, limits.of_all):
            detail = (
                f"the rentals of {new.owner} have {self._taken[owner]} open sessions, which is their limit: end one"
            )
            raise _too_many(detail)
        if len(its) >= limits.of_a_rental:
            raise _too_many(f"the rental has {limits.of_a_rental} open sessions, which is its limit: end one")
        has_room = may_take(owner, young_of_owners, limits.young_of_a_worker)
        if young_of_its >= limits.young_of_a_rental or not has_room:
            raise _too_many("too many sessions began on this worker at once: try again in half a minute")


def _too_many(detail: str) -> ApiProblem:
    return ApiProblem(429, "too_many_sessions", detail, headers={"Retry-After": "5"})


def _forget(by: dict[str, set[Session]], key: str, session: Session) -> None:
    by[key].discard(session)
    if not by[key]:
        del by[key]
