"""The agent's decisions about the manager's answers and the lease. Pure: no clock, no network, no chance."""

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
"""Short because calls cost nothing while the manager is unreachable, and a platform that starts needs its workers."""
LIVENESS_GRACE_S = 1.0
"""Seconds for which rentals may run after the liveness connection has ended, without an answer from the manager.

The manager takes silence for death 1.5 s after it saw that end (ssh/liveness.py): by then all must be frozen.
"""
LIVENESS_SETTLES_S = 0.25
"""Seconds until the manager has seen the end of a liveness connection, even if TCP had to repeat it after 0.2 s.

A call that is sent earlier may arrive before that end, and then would not count against a proof of death.
"""
CARRIED_FILES_S = 150
CARRIED_BYTES_S = 4 * 2**20
"""Files and bytes that a planned migration or a park carries per second at least, on a machine with other load."""


def stop_grace_s(least_s: float, most_s: float, files: int, size: int) -> float:
    """Return the seconds that an evacuating worker may wait for the migration of its rentals."""
    return min(most_s, least_s + files / CARRIED_FILES_S + size / CARRIED_BYTES_S)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An HTTP reply; if there was none, `status` is 0 and `reason` says why."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    retry_after_s: float = 0.0
    marked: bool = False
    """Whether the proxy itself said, by a header that only it can set, that the manager cannot be reached."""

    @property
    def unreached(self) -> bool:
        """Whether the manager has not seen the request: there was no answer, or the proxy itself said so."""
        return not self.status or self.marked

    def __str__(self) -> str:
        if not self.status:
            return f"no answer ({self.reason})"
        words = [str(self.body.get(name)) for name in ("code", "detail") if self.body.get(name)]
        return f"{self.status} {': '.join(words)}".strip()[:300]


class Next(Enum):
    """The agent's next step after an answer."""

    ACKNOWLEDGED = "the session is good, the lease is renewed"
    REGISTER = "register again at once"
    FORGET = "the worker's token is no longer known: register as a new worker"
    RETRY = "try the same again after a while"


def after_register(answer: Answer, with_own_token: bool) -> Next:
    """Return the next step after the answer to a registration."""
    if answer.status == 201:
        return Next.ACKNOWLEDGED
    if with_own_token and (answer.status == 401 or answer.body.get("code") == "host_key_changed"):
        return Next.FORGET
    return Next.RETRY


def after_heartbeat(answer: Answer) -> Next:
    """Return the next step after the answer to a heartbeat. Only a 200 renews the lease."""
    if answer.status == 200:
        return Next.ACKNOWLEDGED
    if answer.status == 401 or (answer.status == 409 and answer.body.get("code") == "stale_session"):
        return Next.REGISTER
    return Next.RETRY


def backoff_s(attempt: int, longest_s: float, chance: float, at_least_s: float = 0.0) -> float:
    """Return the seconds to wait after failure number `attempt` (from 1): full jitter below 1, 2, 4, ... `longest_s`.

    `chance` is from 0 to 1; `at_least_s` is the server's Retry-After.
    """
    return max(at_least_s, chance * min(longest_s, 2.0 ** min(attempt - 1, 16)))


@dataclass(frozen=True, kw_only=True)
class LeaseState:
    """This worker's right to run rentals. Times are its CLOCK_BOOTTIME at the moment at which a call was sent."""

    lease_s: float = 0.0
    """Seconds from an acknowledged call for which rentals may run."""
    proxy_answer_s: float = 0.0
    """Seconds from a call for which the proxy's answer that the manager cannot be reached gives the right to run."""
    acknowledged_at: float | None = None
    """The time of the last acknowledged call: the lease runs from its sending, not from the reply."""
    unreached_at: float | None = None
    """The time of the last call, if the proxy answered it with its mark; None: another answer, or none."""


def may_run(lease: LeaseState, liveness_ended_at: float | None, now: float) -> bool:
    """Return whether rentals may run here. `liveness_ended_at`: when the liveness connection last ended.

    They may run by a lease, because the manager waits for its end before it runs them elsewhere; or by a fresh answer
    of the proxy that the manager cannot be reached, because such a manager takes nothing over. Answers to calls from
    before the end of the liveness connection count for LIVENESS_GRACE_S more only: the manager may take that end, and
    silence after it, for this worker's death.
    """
    acknowledged_at, unreached_at = lease.acknowledged_at, lease.unreached_at
    if liveness_ended_at is not None and now - liveness_ended_at >= LIVENESS_GRACE_S:
        acknowledged_at = _not_before(liveness_ended_at + LIVENESS_SETTLES_S, acknowledged_at)
        unreached_at = _not_before(liveness_ended_at + LIVENESS_SETTLES_S, unreached_at)
    leased = acknowledged_at is not None and now - acknowledged_at < lease.lease_s
    excused = unreached_at is not None and now - unreached_at < lease.proxy_answer_s
    return leased or excused


def ask_within_s(lease: LeaseState, liveness_ended_at: float | None, now: float) -> float:
    """Return the most seconds that the next call may wait. A worker about to lose its right to run calls often."""
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
    """An action of the agent on a rental of this worker."""

    action: str
    """`lock`, `unlock` or `thaw`."""
    rental_id: str
    epoch: int


_TO_RUN = {"locked": "unlock", "frozen": "thaw"}
_TO_SHUT = {"running": "lock"}


def actions_for(inventory: Iterable[dict[str, Any]], placements: Iterable[dict[str, Any]]) -> list[RentalAction]:
    """Return the actions that the placements of a reply ask for. A rental that the reply does not name stays as it is.

    A reply may name a rental twice, with an old epoch to purge and a new one to run. An entry of an older epoch says
    nothing about the one here. An entry that runs a newer epoch means that the one here is stale, and must be locked.
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
"""An optional field of a heartbeat, which managers of earlier versions refuse."""


def accepted_fields_from(body: dict[str, Any]) -> frozenset[str]:
    """Return the optional fields that the manager takes in a heartbeat, from its reply to the last one."""
    names = body.get("takes")
    return frozenset(each for each in names if isinstance(each, str)) if isinstance(names, list) else frozenset()


@dataclass(frozen=True, kw_only=True)
class AgentSession:
    """The reply to a registration."""

    worker_id: str
    worker_token: str
    session_id: str
    interval_s: float
    lease_s: float
    proxy_answer_s: float
    authorized_keys: tuple[str, ...]
    placements: tuple[dict[str, Any], ...]


def agent_session_from(body: dict[str, Any]) -> AgentSession:
    """Return the session in the reply to a registration. Raise ValueError for a reply of another form."""
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
    """Return the placements of a reply. Raise ValueError unless they are a list of {rental_id, epoch, want}."""
    if not isinstance(value, list):
        raise ValueError("placements is not a list")
    for each in value:
        named = isinstance(each, dict) and isinstance(each.get("rental_id"), str)
        if not (named and type(each.get("epoch")) is int and each.get("want") in ("run", "hold", "purge")):
            raise ValueError("a placement has another form")
    return tuple(value)


def interval_from(value: Any) -> float:
    """Return an interval in seconds. Raise ValueError for one that would stop the agent or make it spin."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("an interval is not a number")
    if not 0.05 <= value <= 86_400:
        raise ValueError(f"an interval of {value} s is not sensible")
    return float(value)


def proxy_answer_from(body: dict[str, Any]) -> float:
    """Return `door_answer_s` of a reply (a released name). Without it, managers mean a fifteenth of the lease."""
    if "door_answer_s" in body:
        return interval_from(body["door_answer_s"])
    return interval_from(body.get("lease_s")) / 15


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\n" in value:
        raise ValueError("a text of the reply is empty or has more than a line")
    return value
