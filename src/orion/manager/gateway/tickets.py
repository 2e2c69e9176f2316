"""Who may open a terminal in a browser, by tickets, and how many may.

A page cannot send a token with a WebSocket, and a token belongs into no address.

A ticket is good once, for a minute, for one rental. A resume key is given to a page whose terminal is open, so that
it may open that terminal again when it is reloaded. Only hashes are kept, in memory: a manager that restarts knows
none.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from orion.manager.domain.fair_share import Claim, may_take
from orion.manager.gateway.terminal import Terms
from orion.manager.refusals import ApiProblem
from orion.manager.store.tokens import Principal, digest

LIFETIME_S = 60.0
MOST = 2000
MOST_OF_ONE = 50
"""Unused ones, for all that one token has asked for: nobody can use up the others' share."""
RESUME_WITHIN_S = 600.0  # seconds from the moment in which a page has left
MOST_OF_A_RENTAL = 20
MOST_OF_ALL = 200
"""Terminals at once, of which those that one token's name has opened are half at most. Of each the manager is the SSH
client: that costs more than to relay bytes."""


@dataclass(frozen=True)
class Ticket:
    rental_id: str
    principal: Principal
    ends_at: float


class Tickets:
    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._kept: dict[str, Ticket] = {}
        """By their hash, in the order in which they end."""

    def issue(self, rental_id: str, principal: Principal) -> str:
        """A new one. Raises ApiProblem where there are too many."""
        now = self._monotonic()
        self._drop_old(now)
        its = sum(kept.principal.id == principal.id for kept in self._kept.values())
        if its >= MOST_OF_ONE or len(self._kept) >= MOST:
            detail = f"too many tickets wait to be used: each is over after {LIFETIME_S:.0f} s"
            raise ApiProblem(429, "too_many_tickets", detail, {"Retry-After": "5"})
        ticket = secrets.token_urlsafe(32)
        self._kept[digest(ticket)] = Ticket(rental_id, principal, now + LIFETIME_S)
        return ticket

    def redeem(self, ticket: str, rental_id: str) -> Principal | None:
        """Who asked for it; None unless it is good for this rental. It is used up in either case."""
        kept = self._kept.pop(digest(ticket), None)
        if kept is None or kept.rental_id != rental_id or kept.ends_at <= self._monotonic():
            return None
        return kept.principal

    def _drop_old(self, now: float) -> None:
        while self._kept:
            first = next(iter(self._kept))
            if self._kept[first].ends_at > now:
                return
            del self._kept[first]


@dataclass(eq=False)
class Resume:
    """The right to open one rental's terminal again."""

    key: str
    rental_id: str
    principal: Principal
    began_at: float
    """Monotonic seconds at which the first terminal was opened: a reload gives no more time than that one had."""
    terminals: int = 0
    """Number of terminals that are open by it."""
    left_at: float = 0.0
    """Monotonic seconds at which the last of these was closed."""


class Resumes:
    """The resume keys that are good. Each ends with its token, which is asked for at every use of a key."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._kept: dict[str, Resume] = {}
        """By the hash of the key, in the order in which the keys were made."""

    def begin(self, rental_id: str, principal: Principal) -> Resume:
        """Return a new right, whose key no page has yet."""
        return Resume(secrets.token_urlsafe(32), rental_id, principal, self._monotonic())

    def redeem(self, key: str, rental_id: str) -> Resume | None:
        """Return the right that has this key; None if there is none for this rental, or none any more."""
        self._drop_old()
        kept = self._kept.get(digest(key))
        return kept if kept is not None and kept.rental_id == rental_id else None

    @contextmanager
    def used(self, resume: Resume) -> Iterator[None]:
        """Keep the right for as long as a terminal is open by it, and for a while after that."""
        self._kept[digest(resume.key)] = resume
        resume.terminals += 1
        try:
            yield
        finally:
            resume.terminals -= 1
            resume.left_at = self._monotonic()
            self._drop_old()

    def forget(self, resume: Resume) -> None:
        """Drop the right: what it was for has ended."""
        self._kept.pop(digest(resume.key), None)

    def _drop_old(self) -> None:
        now = self._monotonic()
        waiting: Counter[str] = Counter()
        for name, kept in reversed(list(self._kept.items())):
            waits = kept.terminals == 0
            waiting[kept.principal.id] += waits
            too_many = waits and waiting[kept.principal.id] > MOST_OF_ONE
            if too_many or (waits and now >= kept.left_at + RESUME_WITHIN_S):
                del self._kept[name]


class Terminals:
    """Those that are open, and the tickets for more."""

    def __init__(self, monotonic: Callable[[], float], terms: Terms | None = None) -> None:
        self.tickets = Tickets(monotonic)
        self.resumes = Resumes(monotonic)
        self.terms = terms or Terms()
        self._open: Counter[str] = Counter()
        self._taken: Counter[Claim] = Counter()
        """By the name of the token that opened them."""

    def check(self, rental_id: str, who: str) -> None:
        """Raises ApiProblem where there are too many."""
        if self._open[rental_id] >= MOST_OF_A_RENTAL:
            detail = f"the rental has {MOST_OF_A_RENTAL} terminals open in browsers, and may have no more: close one"
            raise ApiProblem(429, "too_many_terminals", detail, {"Retry-After": "5"})
        if self._open.total() >= MOST_OF_ALL:
            detail = f"the platform serves {MOST_OF_ALL} terminals in browsers, and no more: ssh goes on to work"
            raise ApiProblem(503, "too_many_terminals", detail, {"Retry-After": "30"})
        if not may_take(Claim(who), self._taken, MOST_OF_ALL):
            detail = f"{who} has {self._taken[Claim(who)]} terminals open in browsers, and may have no more: close one"
            raise ApiProblem(429, "too_many_terminals", detail, {"Retry-After": "5"})

    @contextmanager
    def opened(self, rental_id: str, who: str) -> Iterator[None]:
        """Raises ApiProblem where there are too many."""
        self.check(rental_id, who)
        self._open[rental_id] += 1
        self._taken[Claim(who)] += 1
        try:
            yield
        finally:
            self._open[rental_id] -= 1
            self._taken[Claim(who)] -= 1
            self._open += Counter()  # forgets what is at zero
            self._taken += Counter()
