"""The calls to the manager: register, then a heartbeat at the interval that the manager sets, for ever."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import threading
import urllib.parse
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from orion_worker.agent import decisions
from orion_worker.agent.decisions import AgentSession, Answer, LeaseState, Next
from orion_worker.agent.node import LogLine, Node

REQUEST_TIMEOUT_S = 5.0
GOODBYE_TIMEOUT_S = 3.0
EVACUATING_INTERVAL_S = 0.4
"""Seconds between calls during an evacuation: each call reports the rentals left, and its reply brings orders."""
EVACUATING_PATIENCE_S = 6.0
"""Seconds for which the manager may be silent during an evacuation: it may be starting again."""
TOKEN_POLL_S = 1.0
LARGEST_REPLY_BYTES = 4 * 2**20
ANY_IPV4 = ("0.0.0.0", 0)  # noqa: S104 - the source of calls: nothing listens there


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request to the manager."""

    path: str
    token: str
    body: dict[str, Any]
    timeout_s: float = REQUEST_TIMEOUT_S


Talk = Generator[Call, Answer, float]
"""Yields each call, is sent its answer, and returns the seconds to wait before the next step."""


Post = Callable[[Call], Answer]
"""A function that makes a call and returns the manager's answer. It never raises: a failure has no status."""


def post_by_http(url: str, call: Call) -> Answer:
    """Make a call to the manager at this URL, with a new connection: the proxy may be another container by now.

    It uses IPv4 alone: the manager knows a worker by its IPv4 address, and the packet filter drops IPv6. A name that
    leads to an IPv6 address as well would cost seconds with each call.
    """
    headers = {"Authorization": f"Bearer {call.token}", "Content-Type": "application/json"}
    address = urllib.parse.urlsplit(url).netloc
    connection = http.client.HTTPConnection(address, timeout=call.timeout_s, source_address=ANY_IPV4)
    try:
        connection.request("POST", call.path, json.dumps(call.body), headers)
        reply = connection.getresponse()
        text = reply.read(LARGEST_REPLY_BYTES)
    except (OSError, http.client.HTTPException) as error:
        return Answer(status=0, reason=str(error) or type(error).__name__)
    finally:
        connection.close()
    marked = reply.headers.get("X-Orion-Manager") == "unreachable"
    return Answer(
        status=reply.status,
        body=_json_object(text),
        reason=reply.reason,
        retry_after_s=_seconds(reply.headers.get("Retry-After")),
        marked=marked,
    )


class HomeCaller:
    """The state of the calls to the manager; `step` makes the next one and returns the seconds to wait after it.

    `clock` is CLOCK_BOOTTIME, which counts while the machine sleeps; `chance` returns numbers from 0 to 1. `on_renewal`
    is called when the lease was renewed, before the orders of the reply are carried out.
    """

    def __init__(
        self,
        *,
        node: Node,
        post: Post,
        clock: Callable[[], float],
        chance: Callable[[], float],
        say: LogLine,
        on_renewal: Callable[[], None] = lambda: None,
    ) -> None:
        self._node = node
        self._post = post
        self._clock = clock
        self._chance = chance
        self._say = say
        self._on_renewal = on_renewal
        self._session: AgentSession | None = None
        self._sequence = itertools.count(1)
        self._failures = 0
        self._waiting_for_token = False
        self._obeying = threading.Lock()
        self._exiting = False
        self._accepted_fields: frozenset[str] = frozenset()
        self._evacuating_since: float | None = None
        self.lease = LeaseState()
        self.liveness_ended_at: float | None = None
        """When a liveness connection last ended out of order (CLOCK_BOOTTIME). The agent's main sets it."""
        self.liveness_closed_at: float | None = None
        """When the manager last closed a liveness connection in order, which it mostly does before a restart."""

    @property
    def is_registered(self) -> bool:
        """Return whether the manager has given this agent a session since its start."""
        return self._session is not None

    def step(self) -> float:
        """Make the next calls; return the seconds to wait before the following step."""
        talk = self.talk()
        try:
            call = next(talk)
            while True:
                call = talk.send(self._post(call))
        except StopIteration as end:
            wait_s: float = end.value
            return wait_s

    def talk(self) -> Talk:
        """Return the next step as a generator, for a caller that makes the calls itself."""
        return self._heartbeat(self._session) if self._session else self._register()

    def due_s(self) -> float:
        """Return the most seconds that the next call may wait; fewer if a liveness connection ended since `step`."""
        ended_at = max((at for at in (self.liveness_ended_at, self.liveness_closed_at) if at is not None), default=None)
        within_s = decisions.ask_within_s(self.lease, ended_at, self._clock())
        return within_s if self._evacuating_since is None else min(within_s, EVACUATING_INTERVAL_S)

    def evacuate(self) -> None:
        """Ask the manager, from the next call on, to migrate all rentals, which run meanwhile."""
        self._evacuating_since = self._clock()

    def is_evacuating(self) -> bool:
        """Return whether waiting helps: rentals are left here, and the manager has answered lately."""
        if self._evacuating_since is None or self._session is None or not self._node.inventory():
            return False
        answered_at = max(self._evacuating_since, self.lease.acknowledged_at or 0.0)
        return self._clock() - answered_at < EVACUATING_PATIENCE_S

    def begin_exit(self) -> None:
        """Lock all rentals and end their processes. No reply, not even one under way, activates one afterwards."""
        with self._obeying:
            self._exiting = True
        self._node.lock_all(kill=True)

    def say_goodbye(self) -> None:
        """Send the last heartbeat, once."""
        call = self.goodbye()
        if call:
            answer = self._post(call)
            self._say("said goodbye" if answer.status == 200 else f"the goodbye was not acknowledged: {answer}")

    def goodbye(self) -> Call | None:
        """Return the last call; None if the worker is not registered."""
        session = self._session
        if session is None:
            return None
        self._evacuating_since = None
        body = {**self._heartbeat_body(session), "leaving": True}  # the released name of exiting
        return Call(path="/api/heartbeat", token=session.worker_token, body=body, timeout_s=GOODBYE_TIMEOUT_S)

    def _register(self) -> Talk:
        own = self._node.own_token()
        token = own or self._node.join_token()
        if token is None:
            if not self._waiting_for_token:
                self._say("waiting for the manager to make the join token in /run/orion-join/token")
            self._waiting_for_token = True
            return TOKEN_POLL_S
        self._waiting_for_token = False
        sent_at = self._clock()
        answer = yield Call(path="/api/register", token=token, body=self._node.describe())
        self._note(answer, sent_at)
        match decisions.after_register(answer, with_own_token=own is not None):
            case Next.ACKNOWLEDGED:
                return self._begin(answer, sent_at)
            case Next.FORGET:
                self._say(f"the identity of this worker is no longer accepted ({answer}): registering as a new worker")
                self._node.forget_identity()
                return 0.0
        return self._try_later("registration failed", answer, decisions.REGISTER_RETRY_MAX_S)

    def _begin(self, answer: Answer, sent_at: float) -> float:
        try:
            session = decisions.agent_session_from(answer.body)
        except ValueError as error:
            return self._try_later(f"wrong reply to the registration: {error}", answer, decisions.REGISTER_RETRY_MAX_S)
        self._node.keep_identity(session)
        self._node.admit(session.authorized_keys)
        self._session = session
        self._say(f"registered as {session.worker_id}, heartbeat every {session.interval_s:g} s")
        self._acknowledge(session, sent_at)
        self._obey(session.placements, sent_at)
        return session.interval_s

    def _heartbeat(self, session: AgentSession) -> Talk:
        sent_at = self._clock()
        more = {decisions.START_ENDS: self._node.start_ends()} if decisions.START_ENDS in self._accepted_fields else {}
        answer = yield Call(
            path="/api/heartbeat", token=session.worker_token, body=self._heartbeat_body(session) | more
        )
        # After a failure no optional field is sent: the manager may be an older one now, and would refuse it.
        self._accepted_fields = decisions.accepted_fields_from(answer.body) if answer.status == 200 else frozenset()
        self._note(answer, sent_at)
        match decisions.after_heartbeat(answer):
            case Next.ACKNOWLEDGED:
                return self._continue(session, answer, sent_at)
            case Next.REGISTER:
                self._say(f"the manager asks for a new registration ({answer})")
                self._session = None
                return 0.0
        return self._try_later("heartbeat failed", answer, decisions.HEARTBEAT_RETRY_MAX_S)

    def _continue(self, session: AgentSession, answer: Answer, sent_at: float) -> float:
        try:
            interval_s = decisions.interval_from(answer.body.get("next_heartbeat_s"))
            lease_s = decisions.interval_from(answer.body.get("lease_s"))
            proxy_answer_s = decisions.proxy_answer_from(answer.body)
            placements = decisions.placements_from(answer.body.get("placements"))
        except ValueError as error:
            return self._try_later(f"wrong reply to the heartbeat: {error}", answer, decisions.HEARTBEAT_RETRY_MAX_S)
        if self._failures:
            self._say(f"heartbeat acknowledged again after {self._failures} failures")
        self._session = replace(session, lease_s=lease_s, proxy_answer_s=proxy_answer_s)
        self._acknowledge(self._session, sent_at)
        self._obey(placements, sent_at)
        return interval_s if self._evacuating_since is None else min(interval_s, EVACUATING_INTERVAL_S)

    def _heartbeat_body(self, session: AgentSession) -> dict[str, Any]:
        body = {"session_id": session.session_id, "seq": next(self._sequence), "load": self._node.load()}
        if self._evacuating_since is not None:
            body["vacating"] = True  # the released name of evacuating
        # A manager with other clocks must know by which lease this worker runs.
        return body | {"inventory": self._node.inventory(), "lease_s": session.lease_s}

    def _note(self, answer: Answer, sent_at: float) -> None:
        self.lease = replace(self.lease, unreached_at=sent_at if answer.marked else None)

    def _acknowledge(self, session: AgentSession, sent_at: float) -> None:
        self._failures = 0
        self.lease = LeaseState(lease_s=session.lease_s, proxy_answer_s=session.proxy_answer_s, acknowledged_at=sent_at)
        self._on_renewal()
        self._node.note_acknowledgement()

    def _obey(self, placements: tuple[dict[str, Any], ...], requested_at: float) -> None:
        """Carry out the orders of a reply, unless its lease is over already, as after a sleep of the machine."""
        with self._obeying:
            if not self._exiting and decisions.may_run(self.lease, self.liveness_ended_at, self._clock()):
                self._node.carry_out(decisions.actions_for(self._node.inventory(), placements), requested_at)

    def _try_later(self, what: str, answer: Answer, longest_s: float) -> float:
        self._failures += 1
        longest_s = min(longest_s, decisions.UNREACHED_RETRY_MAX_S) if answer.unreached else longest_s
        longest_s = min(longest_s, self.due_s())
        wait_s = decisions.backoff_s(self._failures, longest_s, self._chance(), answer.retry_after_s)
        self._say(f"{what}: {answer}; next try in {wait_s:.1f} s")
        return wait_s


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _seconds(value: str | None) -> float:
    """Return Retry-After in seconds, at most a minute: a wrong header must not silence a worker."""
    try:
        seconds = float(value or 0)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), 60.0) if math.isfinite(seconds) else 0.0
