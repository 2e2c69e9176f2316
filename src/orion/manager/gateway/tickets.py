"""Tickets and resume keys, which open browser terminals, and the limits of open terminals.

A page cannot send a token with a WebSocket, and a token must not be in an address. A ticket is valid once, for one
minute and one rental. A page whose terminal is open gets a resume key, which opens the terminal again after a reload.
Only hashes are kept, in memory: a restart of the manager voids them all. The resume key is not a cookie, which would go
with every request to that host, on every port. A page never stores its token, because a browser writes `sessionStorage`
to its disk.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from orion.manager.domain.fair_share import Claim, may_take
from orion.manager.gateway.terminal import Terms
from orion.manager.refusals import ApiProblem
from orion.manager.store.tokens import Principal, digest

LIFETIME_S = 60.0
MOST = 2000
"""Unused tickets of all tokens."""
MOST_OF_ONE = 50
"""Unused tickets of one token, so that none uses up the share of the others."""
RESUME_WITHIN_S = 600.0
"""Seconds for which a resume key is valid after its page has disconnected."""
MOST_OF_A_RENTAL = 20
"""Open terminals of one rental."""
MOST_OF_ALL = 200
"""Open terminals; those of one token's name are half of them at most. The manager is the SSH client of each, which
costs more than to relay bytes."""


@dataclass(frozen=True)
class Ticket:
    rental_id: str
    principal: Principal
    ends_at: float


@dataclass(eq=False)
class Tickets:
    monotonic: Callable[[], float]
    _kept: dict[str, Ticket] = field(default_factory=dict)
    """The unused tickets by their hash."""

    def issue(self, rental_id: str, principal: Principal) -> str:
        """Return a new ticket. Raise ApiProblem if there are too many."""
        now = self.monotonic()
        self._kept = {name: kept for name, kept in self._kept.items() if kept.ends_at > now}
        its = sum(kept.principal.id == principal.id for kept in self._kept.values())
        if its >= MOST_OF_ONE or len(self._kept) >= MOST:
            detail = f"too many unused tickets: try again when they have expired, after {LIFETIME_S:.0f} s"
            raise ApiProblem(429, "too_many_tickets", detail, headers={"Retry-After": "5"})
        ticket = secrets.token_urlsafe(32)
        self._kept[digest(ticket)] = Ticket(rental_id, principal, now + LIFETIME_S)
        return ticket

    def redeem(self, ticket: str, rental_id: str) -> Principal | None:
        """Use up the ticket. Return the principal that it was issued to, or None if it is not valid for this rental."""
        kept = self._kept.pop(digest(ticket), None)
        if kept is None or kept.rental_id != rental_id or kept.ends_at <= self.monotonic():
            return None
        return kept.principal


@dataclass(eq=False, kw_only=True)
class Resume:
    """The right to open one rental's terminal again."""

    key: str
    rental_id: str
    principal: Principal
    began_at: float
    """Monotonic seconds at which the first terminal was opened; a reload does not extend the terminal's time."""
    terminals: int = 0
    """The number of terminals that are open by it."""
    left_at: float = 0.0
    """Monotonic seconds at which the last of these was closed."""


@dataclass(eq=False)
class Resumes:
    """The valid resume keys. The caller checks the key's token at each use."""

    monotonic: Callable[[], float]
    _kept: dict[str, Resume] = field(default_factory=dict)
    """The rights by the hash of their key, in the order in which they were made."""

    def begin(self, rental_id: str, principal: Principal) -> Resume:
        """Return a new right."""
        return Resume(
            key=secrets.token_urlsafe(32), rental_id=rental_id, principal=principal, began_at=self.monotonic()
        )

    def redeem(self, key: str, rental_id: str) -> Resume | None:
        """Return the right that has this key, or None if there is none for this rental."""
        self._drop_old()
        kept = self._kept.get(digest(key))
        return kept if kept is not None and kept.rental_id == rental_id else None

    @contextmanager
    def used(self, resume: Resume) -> Iterator[None]:
        """Keep the right during the block, and for RESUME_WITHIN_S after it."""
        self._kept[digest(resume.key)] = resume
        resume.terminals += 1
        try:
            yield
        finally:
            resume.terminals -= 1
            resume.left_at = self.monotonic()
            self._drop_old()

    def forget(self, resume: Resume) -> None:
        """Drop the right, because its terminal has ended."""
        self._kept.pop(digest(resume.key), None)

    def _drop_old(self) -> None:
        now = self.monotonic()
        waiting: Counter[str] = Counter()
        for name, kept in reversed(list(self._kept.items())):
            waits = kept.terminals == 0
            waiting[kept.principal.id] += waits
            too_many = waits and waiting[kept.principal.id] > MOST_OF_ONE
            if too_many or (waits and now >= kept.left_at + RESUME_WITHIN_S):
                del self._kept[name]


class Terminals:
    """The open terminals, and the tickets and resume keys for further ones."""

    def __init__(self, monotonic: Callable[[], float], terms: Terms | None = None) -> None:
        self.tickets = Tickets(monotonic)
        self.resumes = Resumes(monotonic)
        self.terms = terms or Terms()
        self._open: Counter[str] = Counter()
        self._taken: Counter[Claim] = Counter()
        """The number of open terminals by the token's name."""

    def check(self, rental_id: str, name: str) -> None:
        """Raise ApiProblem if the rental, the token's name or the platform has too many open terminals."""
        if self._open[rental_id] >= MOST_OF_A_RENTAL:
            detail = f"the rental has {MOST_OF_A_RENTAL} open browser terminals, which is its limit: close one"
            raise ApiProblem(429, "too_many_terminals", detail, headers={"Retry-After": "5"})
        if self._open.total() >= MOST_OF_ALL:
            detail = f"the platform has {MOST_OF_ALL} open browser terminals, which is its limit: use ssh meanwhile"
            raise ApiProblem(503, "too_many_terminals", detail, headers={"Retry-After": "30"})
        if not may_take(Claim(name), self._taken, MOST_OF_ALL):
            detail = f"{name} has {self._taken[Claim(name)]} open browser terminals, which is the limit: close one"
            raise ApiProblem(429, "too_many_terminals", detail, headers={"Retry-After": "5"})

    @contextmanager
    def opened(self, rental_id: str, name: str) -> Iterator[None]:
        """Count a terminal as open during the block. Raise ApiProblem if there are too many."""
        self.check(rental_id, name)
        self._open[rental_id] += 1
        self._taken[Claim(name)] += 1
        try:
            yield
        finally:
            self._open[rental_id] -= 1
            self._taken[Claim(name)] -= 1
            self._open += Counter()  # drops the entries that are zero
            self._taken += Counter()
