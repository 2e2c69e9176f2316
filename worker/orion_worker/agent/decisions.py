"""What the agent makes of what it hears. Pure: no clock, no network, no chance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

REGISTER_RETRY_MAX_S = 30.0
HEARTBEAT_RETRY_MAX_S = 5.0
"""Shorter than for a registration: a lease runs out meanwhile, and a heartbeat costs the manager little."""

UNREACHED_RETRY_MAX_S = 3.0
"""While the manager is not there at all, asking costs it nothing; and a platform that starts is complete at once."""


LIVENESS_GRACE_S = 1.0
"""How long a worker may go on without word from the manager when the watch on it has ended.

The manager takes silence for death 1.5 s after it saw that end (ssh/liveness.py): then all must have stood still.
"""
LIVENESS_SETTLES_S = 0.25
"""Until the end of a watch has reached the manager, even if its message was lost once (TCP repeats it after 0.2 s).

A call that is sent earlier may arrive before it, and so would not count against a proof of death.
"""


CARRIED_FILES_S = 150
CARRIED_BYTES_S = 4 * 2**20
"""What a planned move, or a park, carries in a second at least, on a machine that does other things as well."""


def stop_grace_s(least_s: float, most_s: float, files: int, size: int) -> float:
    """Return how long a worker that was told to stop may wait until what it holds was carried away."""
    return min(most_s, least_s + files / CARRIED_FILES_S + size / CARRIED_BYTES_S)


@dataclass(frozen=True)
class Answer:
    """An HTTP reply, or that there was none: then `status` is 0 and `reason` says why."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    retry_after_s: float = 0.0
    marked: bool = False
    """The proxy's own word, by a header that it lets nobody else set, that the manager cannot be reached."""

    @property
    def unreached(self) -> bool:
        """The manager has not seen the request: nobody answered, or the proxy itself said so."""
        return not self.status or self.marked

    def __str__(self) -> str:
        if not self.status:
            return f"no answer ({self.reason})"
        words = [str(self.body.get(name)) for name in ("code", "detail") if self.body.get(name)]
        return f"{self.status} {': '.join(words)}".strip()[:300]


class Next(Enum):
    ACKNOWLEDGED = "the session is good, the lease is renewed"
    REGISTER = "register again at once"
    FORGET = "our token is not known any more: register as a new worker"
    RETRY = "try the same again after a while"


def after_register(answer: Answer, with_own_token: bool) -> Next:
    if answer.status == 201:
        return Next.ACKNOWLEDGED
    if with_own_token and (answer.status == 401 or answer.body.get("code") == "host_key_changed"):
        return Next.FORGET
    return Next.RETRY


def after_heartbeat(answer: Answer) -> Next:
    """Only a 200 renews the lease."""
    if answer.status == 200:
        return Next.ACKNOWLEDGED
    if answer.status == 401 or (answer.status == 409 and answer.body.get("code") == "stale_session"):
        return Next.REGISTER
    return Next.RETRY


def backoff_s(attempt: int, longest_s: float, chance: float, at_least_s: float = 0.0) -> float:
    """Seconds to wait after failure number `attempt` (from 1): full jitter below 1, 2, 4, ... `longest_s`.

    `chance` is from 0 to 1; `at_least_s` what the server asked for.
    """
    return max(at_least_s, chance * min(longest_s, 2.0 ** min(attempt - 1, 16)))


@dataclass(frozen=True)
class LeaseState:
    """What this worker's right to run rentals rests on. Times are its own CLOCK_BOOTTIME, of when a call was sent."""

    lease_s: float = 0.0
    proxy_answer_s: float = 0.0
    """How old the proxy's word that the manager cannot be reached may be."""
    acknowledged_at: float | None = None
    """Of the last acknowledged call: the lease runs from there, not from the reply."""
    unreached_at: float | None = None
    """Of the last call, if the proxy's marked word was its answer; None: another answer, or none."""


def may_run(lease: LeaseState, liveness_ended_at: float | None, now: float) -> bool:
    """Whether rentals may run here. `liveness_ended_at`: when the manager's watch on this worker last ended.

    By a lease: the manager lets it pass before it runs anything elsewhere. Or by the proxy's fresh word that the
    manager cannot be reached, which then moves nothing. What was said before the watch ended counts for a moment only:
    the manager may take that end, and silence after it, for this worker's death.
    """
    acknowledged_at, unreached_at = lease.acknowledged_at, lease.unreached_at
    if liveness_ended_at is not None and now - liveness_ended_at >= LIVENESS_GRACE_S:
        acknowledged_at = _not_before(liveness_ended_at + LIVENESS_SETTLES_S, acknowledged_at)
        unreached_at = _not_before(liveness_ended_at + LIVENESS_SETTLES_S, unreached_at)
    leased = acknowledged_at is not None and now - acknowledged_at < lease.lease_s
    excused = unreached_at is not None and now - unreached_at < lease.proxy_answer_s
    return leased or excused


def ask_within_s(lease: LeaseState, liveness_ended_at: float | None, now: float) -> float:
    """How long the next call may wait at most, in seconds: what is about to lose the right to run asks often."""
    acknowledged_at, often_s = lease.acknowledged_at, 0.4 * lease.proxy_answer_s
    if liveness_ended_at is not None and _not_before(liveness_ended_at + LIVENESS_SETTLES_S, acknowledged_at) is None:
        in_time = now - liveness_ended_at < LIVENESS_GRACE_S
        return max(liveness_ended_at + LIVENESS_SETTLES_S - now, LIVENESS_SETTLES_S if in_time else often_s)
    if acknowledged_at is None or not lease.lease_s:
        return math.inf
    return max(often_s, acknowledged_at + lease.lease_s - lease.proxy_answer_s - now)


def _not_before(earliest: float, at: float | None) -> float | None:
    return at if at is not None and at >= earliest else None


@dataclass(frozen=True)
class RentalAction:
    """What to do to a rental that is here."""

    action: str
    """`lock`, `unlock` or `thaw`."""
    rental_id: str
    epoch: int


_TO_RUN = {"locked": "unlock", "frozen": "thaw"}
_TO_SHUT = {"running": "lock"}


def actions_for(inventory: Iterable[dict[str, Any]], placements: Iterable[dict[str, Any]]) -> list[RentalAction]:
    """What a reply's placements mean for what is here; what the reply does not mention is left as it is.

    One rental may be mentioned twice, with an old epoch to purge and a new one to run: an order for an epoch older
    than ours is not about ours. An order to run a newer one means that ours is stale, and must not be let in.
    """
    wanted: dict[str, dict[str, Any]] = {}
    for placement in placements:
        other = wanted.get(placement["rental_id"])
        if other is None or other["epoch"] < placement["epoch"]:
            wanted[placement["rental_id"]] = placement
    found = []
    for item in inventory:
        want = wanted.get(item["rental_id"])
        if want is None or want["epoch"] < item["epoch"]:
            continue
        run = want["want"] == "run" and want["epoch"] == item["epoch"]
        action = (_TO_RUN if run else _TO_SHUT).get(item["state"])
        if action:
            found.append(RentalAction(action, item["rental_id"], item["epoch"]))
    return found


START_ENDS = "start_ends"
"""A field of a heartbeat that a manager from before it would refuse."""


def accepted_fields_from(body: dict[str, Any]) -> frozenset[str]:
    """Return the further fields that the manager takes in a heartbeat, by its reply to the last one."""
    takes = body.get("takes")
    return frozenset(each for each in takes if isinstance(each, str)) if isinstance(takes, list) else frozenset()


@dataclass(frozen=True)
class AgentSession:
    """What a registration gave."""

    worker_id: str
    worker_token: str
    session_id: str
    interval_s: float
    lease_s: float
    proxy_answer_s: float
    authorized_keys: tuple[str, ...]
    placements: tuple[dict[str, Any], ...]


def agent_session_from(body: dict[str, Any]) -> AgentSession:
    """Raises ValueError for a reply that is not of the contract."""
    try:
        return AgentSession(
            worker_id=_text(body["worker_id"]),
            worker_token=_text(body["worker_token"]),
            session_id=_text(body["session_id"]),
            interval_s=interval_from(body["heartbeat_interval_s"]),
            lease_s=interval_from(body["lease_s"]),
            proxy_answer_s=proxy_answer_from(body),
            authorized_keys=tuple(_text(key) for key in body["authorized_keys"]),
            placements=placements_from(body["placements"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a registration: {error!r}") from error


def placements_from(value: Any) -> tuple[dict[str, Any], ...]:
    """Raises ValueError unless it is a list of {rental_id, epoch, want}."""
    if not isinstance(value, list):
        raise ValueError("placements is not a list")
    for each in value:
        named = isinstance(each, dict) and isinstance(each.get("rental_id"), str)
        if not (named and type(each.get("epoch")) is int and each.get("want") in ("run", "hold", "purge")):
            raise ValueError("a placement is not of the contract")
    return tuple(value)


def interval_from(value: Any) -> float:
    """Seconds. Raises ValueError for what cannot be waited: it would stop the agent or spin it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("an interval is not a number")
    if not 0.05 <= value <= 86_400:
        raise ValueError(f"an interval of {value} s is not sensible")
    return float(value)


def proxy_answer_from(body: dict[str, Any]) -> float:
    """`door_answer_s` of a reply; a manager from before it was told means the same share of the lease as by default."""
    if "door_answer_s" in body:
        return interval_from(body["door_answer_s"])
    return interval_from(body.get("lease_s")) / 15


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\n" in value:
        raise ValueError("a text of the reply is empty or has more than a line")
    return value
