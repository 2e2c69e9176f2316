"""Calling home: register, then a heartbeat at the interval that the manager sets, for ever, whatever goes wrong."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import threading
import urllib.parse
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from orion_worker.agent.decisions import (
    HEARTBEAT_RETRY_MAX_S,
    REGISTER_RETRY_MAX_S,
    START_ENDS,
    UNREACHED_RETRY_MAX_S,
    AgentSession,
    Answer,
    LeaseState,
    Next,
    accepted_fields_from,
    actions_for,
    after_heartbeat,
    after_register,
    agent_session_from,
    ask_within_s,
    backoff_s,
    interval_from,
    may_run,
    placements_from,
    proxy_answer_from,
)
from orion_worker.agent.node import LogLine, Node

REQUEST_TIMEOUT_S = 5.0
GOODBYE_TIMEOUT_S = 3.0
EVACUATING_INTERVAL_S = 0.4
"""Between calls while the manager takes away what is here: each shows what is left, and takes what to do with it."""
EVACUATING_PATIENCE_S = 6.0
"""How long a manager that takes things away may be silent: it may have been killed, and another be about to go on."""
TOKEN_POLL_S = 1.0
LARGEST_REPLY_BYTES = 4 * 2**20
ANY_IPV4 = ("0.0.0.0", 0)  # noqa: S104 - where calls come from: nothing listens there


@dataclass(frozen=True)
class Call:
    """One request to the manager."""

    path: str
    token: str
    body: dict[str, Any]
    timeout_s: float = REQUEST_TIMEOUT_S


Talk = Generator[Call, Answer, float]


class CallTransport(Protocol):
    def post(self, path: str, token: str, body: dict[str, Any], timeout_s: float) -> Answer:
        """Never raises: what goes wrong is an Answer without status."""
        ...


class HttpTransport:
    """One connection for each request: the proxy may be another container by the next.

    By IPv4 alone: by its address there a worker is known, and the packet filter lets no IPv6 through. A name that leads
    to an IPv6 address as well would cost seconds with each call.
    """

    def __init__(self, url: str) -> None:
        self._address = urllib.parse.urlsplit(url).netloc

    def post(self, path: str, token: str, body: dict[str, Any], timeout_s: float) -> Answer:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(self._address, timeout=timeout_s, source_address=ANY_IPV4)
        try:
            connection.request("POST", path, json.dumps(body), headers)
            reply = connection.getresponse()
            text = reply.read(LARGEST_REPLY_BYTES)
        except (OSError, http.client.HTTPException) as error:
            return Answer(0, reason=str(error) or type(error).__name__)
        finally:
            connection.close()
        marked = reply.headers.get("X-Orion-Manager") == "unreachable"
        pause_s = _seconds(reply.headers.get("Retry-After"))
        return Answer(reply.status, _json_object(text), reply.reason, pause_s, marked)


class HomeCaller:
    """`step` does the next thing and returns how many seconds to wait before the one after.

    `clock` is CLOCK_BOOTTIME, which goes on while the machine sleeps; `chance` gives numbers from 0 to 1.
    `on_renewal` is told when the lease was renewed, before the reply is obeyed.
    """

    def __init__(
        self,
        node: Node,
        transport: CallTransport,
        clock: Callable[[], float],
        chance: Callable[[], float],
        say: LogLine,
        on_renewal: Callable[[], None] = lambda: None,
    ) -> None:
        self._node = node
        self._transport = transport
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
        """When the manager's watch on this worker last ended; set by who sees it (watched.py)."""
        self.liveness_closed_at: float | None = None
        """When the manager last ended it in order. Mostly it is being started again then, and has heard nobody yet."""

    @property
    def is_registered(self) -> bool:
        """Return whether the manager has given this life of the agent a session."""
        return self._session is not None

    @property
    def acknowledged_at(self) -> float | None:
        return self.lease.acknowledged_at

    def step(self) -> float:
        """Do it over the transport."""
        talk = self.talk()
        try:
            call = next(talk)
            while True:
                call = talk.send(self._transport.post(call.path, call.token, call.body, call.timeout_s))
        except StopIteration as end:
            wait_s: float = end.value
            return wait_s

    def talk(self) -> Talk:
        """The same, for whoever carries the calls: gives each one, takes its answer, returns the seconds to wait."""
        if self._session:
            return self._heartbeat(self._session)
        return self._register()

    def due_s(self) -> float:
        """How long the next call may wait at most: shorter than what `step` said, when the watch has ended since."""
        ended_at = max((at for at in (self.liveness_ended_at, self.liveness_closed_at) if at is not None), default=None)
        within_s = ask_within_s(self.lease, ended_at, self._clock())
        return within_s if self._evacuating_since is None else min(within_s, EVACUATING_INTERVAL_S)

    def evacuate(self) -> None:
        """Ask the manager, from the next call on, to take away what is here. It goes on meanwhile."""
        self._evacuating_since = self._clock()

    def is_evacuating(self) -> bool:
        """Whether there is a point in waiting: something is left here, and a manager that answers takes it away."""
        if self._evacuating_since is None or self._session is None or not self._node.inventory():
            return False
        heard_at = max(self._evacuating_since, self.lease.acknowledged_at or 0.0)
        return self._clock() - heard_at < EVACUATING_PATIENCE_S

    def begin_exit(self) -> None:
        """From here on no reply, not even one that is on its way, can let a renter in."""
        with self._obeying:
            self._exiting = True
        self._node.lock_all(kill=True)

    def say_goodbye(self) -> None:
        call = self.goodbye()
        if call:
            answer = self._transport.post(call.path, call.token, call.body, call.timeout_s)
            self._say("said goodbye" if answer.status == 200 else f"the goodbye was not heard: {answer}")

    def goodbye(self) -> Call | None:
        """The last call; None where there is nobody to tell."""
        session = self._session
        if session is None:
            return None
        self._evacuating_since = None
        body = {**self._heartbeat_body(session), "leaving": True}
        return Call("/api/heartbeat", session.worker_token, body, GOODBYE_TIMEOUT_S)

    def _register(self) -> Talk:
        own = self._node.own_token()
        token = own or self._node.join_token()
        if token is None:
            return self._wait_for_token()
        self._waiting_for_token = False
        sent_at = self._clock()
        answer = yield Call("/api/register", token, self._node.describe())
        self._note(answer, sent_at)
        match after_register(answer, with_own_token=own is not None):
            case Next.ACKNOWLEDGED:
                return self._begin(answer, sent_at)
            case Next.FORGET:
                self._say(f"our identity is not accepted any more ({answer}): registering as a new worker")
                self._node.forget_identity()
                return 0.0
        return self._try_later("registration failed", answer, REGISTER_RETRY_MAX_S)

    def _wait_for_token(self) -> float:
        if not self._waiting_for_token:
            self._say("waiting for the manager to make the join token in /run/orion-join/token")
        self._waiting_for_token = True
        return TOKEN_POLL_S

    def _begin(self, answer: Answer, sent_at: float) -> float:
        try:
            session = agent_session_from(answer.body)
        except ValueError as error:
            return self._try_later(f"registration not understood: {error}", answer, REGISTER_RETRY_MAX_S)
        self._node.keep_identity(session)
        self._node.admit(session.authorized_keys)
        self._session = session
        self._say(f"registered as {session.worker_id}, heartbeat every {session.interval_s:g} s")
        self._acknowledge(session, sent_at)
        self._obey(session.placements, sent_at)
        return session.interval_s

    def _heartbeat(self, session: AgentSession) -> Talk:
        sent_at = self._clock()
        more = {START_ENDS: self._node.start_ends()} if START_ENDS in self._accepted_fields else {}
        answer = yield Call("/api/heartbeat", session.worker_token, self._heartbeat_body(session) | more)
        # After a failure nothing further is told: an older manager may have come, and the lease runs.
        self._accepted_fields = accepted_fields_from(answer.body) if answer.status == 200 else frozenset()
        self._note(answer, sent_at)
        match after_heartbeat(answer):
            case Next.ACKNOWLEDGED:
                return self._go_on(session, answer, sent_at)
            case Next.REGISTER:
                self._say(f"the manager wants us to register again ({answer})")
                self._session = None
                return 0.0
        return self._try_later("heartbeat failed", answer, HEARTBEAT_RETRY_MAX_S)

    def _go_on(self, session: AgentSession, answer: Answer, sent_at: float) -> float:
        try:
            interval_s = interval_from(answer.body.get("next_heartbeat_s"))
            lease_s = interval_from(answer.body.get("lease_s"))
            proxy_answer_s = proxy_answer_from(answer.body)
            placements = placements_from(answer.body.get("placements"))
        except ValueError as error:
            return self._try_later(f"heartbeat not understood: {error}", answer, HEARTBEAT_RETRY_MAX_S)
        if self._failures:
            self._say(f"heartbeat acknowledged again after {self._failures} failures")
        self._session = replace(session, lease_s=lease_s, proxy_answer_s=proxy_answer_s)
        self._acknowledge(self._session, sent_at)
        self._obey(placements, sent_at)
        return interval_s if self._evacuating_since is None else min(interval_s, EVACUATING_INTERVAL_S)

    def _heartbeat_body(self, session: AgentSession) -> dict[str, Any]:
        return {
            **({"vacating": True} if self._evacuating_since is not None else {}),
            "session_id": session.session_id,
            "seq": next(self._sequence),
            "load": self._node.load(),
            "inventory": self._node.inventory(),
            # So that a manager with other clocks knows by which lease this worker runs.
            "lease_s": session.lease_s,
        }

    def _note(self, answer: Answer, sent_at: float) -> None:
        self.lease = replace(self.lease, unreached_at=sent_at if answer.marked else None)

    def _acknowledge(self, session: AgentSession, sent_at: float) -> None:
        self._failures = 0
        self.lease = LeaseState(session.lease_s, session.proxy_answer_s, acknowledged_at=sent_at)
        self._on_renewal()
        self._node.note_acknowledgement()

    def _obey(self, placements: tuple[dict[str, Any], ...], requested_at: float) -> None:
        """Unless the reply is from before a sleep of this machine: then its lease may be over already."""
        with self._obeying:
            if not self._exiting and may_run(self.lease, self.liveness_ended_at, self._clock()):
                self._node.carry_out(actions_for(self._node.inventory(), placements), requested_at)

    def _try_later(self, what: str, answer: Answer, longest_s: float) -> float:
        self._failures += 1
        longest_s = min(longest_s, UNREACHED_RETRY_MAX_S) if answer.unreached else longest_s
        longest_s = min(longest_s, self.due_s())
        wait_s = backoff_s(self._failures, longest_s, self._chance(), answer.retry_after_s)
        self._say(f"{what}: {answer}; next try in {wait_s:.1f} s")
        return wait_s


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _seconds(value: str | None) -> float:
    """Retry-After in seconds, at most a minute: a wrong header must not silence a worker."""
    try:
        seconds = float(value or 0)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), 60.0) if math.isfinite(seconds) else 0.0
