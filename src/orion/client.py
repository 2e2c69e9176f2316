"""The Python SDK: every call of the contract, with the contract's models in and out.

    with Orion.logged_in() as orion:
        rental = orion.rent(name="lab", ttl_s=3600, ssh_public_key=key)

Raises what `orion.errors` declares, and nothing of the HTTP library.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import IO, Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from orion import login as logins
from orion.errors import Ambiguous, InvalidInput, NotFound, Retryable, Unreachable, UnreadableReply
from orion.login import Login
from orion.sse import messages
from orion.transport import OnRetry, Transport
from orion.wire import (
    DEFAULT_TTL_S,
    DEFAULT_WAIT_S,
    MAX_CERTIFICATE_S,
    AddKeyRequest,
    CertificateReply,
    CertificateRequest,
    DrainRequest,
    Event,
    ExposeRequest,
    HeartbeatReply,
    HeartbeatRequest,
    Key,
    LogEntry,
    Page,
    Pruned,
    RegisterReply,
    RegisterRequest,
    RenewRequest,
    Rental,
    RentalState,
    RentReply,
    RentRequest,
    RestorePlan,
    RestoreRequest,
    Restoring,
    Snapshot,
    SshAuthority,
    Status,
    TerminalTicket,
    Token,
    TokenReply,
    TokenRequest,
    WebPort,
    WebPortTicket,
    Worker,
    WorkerHealth,
    WorkerIntent,
    in_words,
)

RENT_RETRY_S = 15.0
"""How long `rent` goes on when the connection breaks: longer than a restart of the manager."""
STREAM_SILENCE_S = 45.0
"""The server sends a comment every 15 s: three are missing."""
STREAM_RETRY_S = 300.0
POLL_S = 10.0
MOVE_POLL_S = 0.5
COPY_WAIT_S = 45.0
"""For a copy of a home, which is made before it is given up."""
ADMIN_WAIT_S = 600.0
"""For a copy of a large database."""
ENDED = frozenset({RentalState.RELEASED, RentalState.EXPIRED, RentalState.FAILED})

_ID = re.compile(r"[a-z0-9-]{1,64}")
_Model = TypeVar("_Model", bound=BaseModel)


class Orion:
    """A connection to one platform. Not for several threads at once. `http`, `sleep`, `clock`: see Transport."""

    def __init__(self, login: Login, **transport: Any) -> None:
        self.url = login.url
        self._transport = Transport(login, **transport)

    @classmethod
    def at(cls, url: str, token: str, ca_file: str | None = None) -> Orion:
        return cls(Login(logins.clean_url(url), logins.clean_token(token), ca_file))

    @classmethod
    def logged_in(cls) -> Orion:
        """With the login of this user or of the environment (see `orion.login.load`)."""
        return cls(logins.load())

    def __enter__(self) -> Orion:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def when_retrying(self, tell: OnRetry) -> None:
        """Have `tell(error, pause_s)` called before each pause, so that a person can be told."""
        self._transport.on_retry = tell

    def be_patient(self, for_s: float) -> None:
        """Try what only reads again for so long while the platform does not answer, as when it is being restarted."""
        self._transport.patience_s = for_s

    # Rentals

    def rent(
        self,
        *,
        name: str | None = None,
        ssh_public_key: str | None = None,
        ttl_s: int = DEFAULT_TTL_S,
        labels: dict[str, str] | None = None,
        start: str | None = None,
        wait_s: float = DEFAULT_WAIT_S,
        idempotency_key: str | None = None,
        retry_for_s: float = RENT_RETRY_S,
    ) -> RentReply:
        """Rent an environment; look at `state`: it may still be queued after `wait_s`.

        A broken connection is tried again with the same idempotency key, so that there is never a second rental.
        Without `ssh_public_key` the server makes a pair, and its private half is in this reply alone.
        `start`: a command that its shell runs whenever it comes to be on a worker.
        """
        fields = {"name": name, "ssh_public_key": ssh_public_key, "ttl_s": ttl_s, "start": start, "wait_s": wait_s}
        request = _valid(RentRequest, **{**fields, "labels": labels or {}})
        headers = {"Idempotency-Key": idempotency_key or secrets.token_urlsafe(24)}
        reply = self._transport.send(
            "POST", "/api/rent", body=request, headers=headers, wait_s=wait_s, retry_for_s=retry_for_s
        )
        return _read(RentReply, reply)

    def rentals(
        self, *, name: str | None = None, ended: bool = False, mine: bool = False, limit: int | None = None
    ) -> Iterator[Rental]:
        """Yield the living rentals, with `ended` all. `mine` leaves out those of others, which an admin sees."""
        query = {"name": name, "ended": "true" if ended else None, "mine": "true" if mine else None, "limit": limit}
        return self._pages(Rental, "/api/rentals", query)

    def rental(self, rental_id: str, *, wait_s: float | None = None, state: RentalState | None = None) -> Rental:
        """The rental; with `wait_s` and `state`, once it is in that state or has ended, or after `wait_s`."""
        query = {"wait_s": wait_s, "state": state.value if state else None}
        return _read(Rental, self._transport.send("GET", _path("rentals", rental_id), params=query, wait_s=wait_s or 0))

    def find_rental(self, id_or_name: str, *, ended: bool = False) -> Rental:
        """Find it by id, else by name among the living, else (with `ended`) the latest that bore the name.

        To an admin, who sees everybody's, a name is that of an own rental first.
        """
        if _ID.fullmatch(id_or_name):
            try:
                return self.rental(id_or_name)
            except NotFound:
                pass
            living = self._named(id_or_name, ended=False)
            if living:
                return _only(living, id_or_name, lambda one: f"{one.id} of {one.owner}")
            past = self._named(id_or_name, ended=True) if ended else []
            if past:
                return max(past, key=lambda one: one.created_at)
        raise NotFound(404, "not_found", f"there is no rental {id_or_name!r}: orion ls shows yours")

    def _named(self, name: str, ended: bool) -> list[Rental]:
        """Return the rentals of this name: only own ones where others' bear it too."""
        found = list(self.rentals(name=name, ended=ended))
        if len({one.owner for one in found}) < 2:
            return found
        return list(self.rentals(name=name, ended=ended, mine=True)) or found

    def wait_for(
        self,
        rental_id: str,
        state: RentalState,
        within_s: float,
        on_change: Callable[[Rental], None] = lambda _rental: None,
    ) -> Rental:
        """The rental once it is in `state` or has ended, or as it is after `within_s`. Waits through outages."""
        transport, failures = self._transport, 0
        give_up_at = transport.clock() + within_s
        while True:
            asked_at = transport.clock()
            wait_s = round(max(0.0, min(POLL_S, give_up_at - asked_at)), 1)
            try:
                rental = self.rental(rental_id, wait_s=wait_s, state=state)
            except Retryable as error:
                failures += 1
                transport.pause(error, failures, give_up_at)
                continue
            failures = 0
            on_change(rental)
            now = transport.clock()
            if rental.state is state or rental.state in ENDED or now >= give_up_at:
                return rental
            # A server that answers a long poll at once must not be asked in a tight loop.
            transport.sleep(max(0.0, min(0.5 - (now - asked_at), give_up_at - now)))

    def renew(self, rental_id: str, ttl_s: int = DEFAULT_TTL_S) -> Rental:
        body = _valid(RenewRequest, ttl_s=ttl_s)
        return _read(Rental, self._transport.send("POST", _path("rentals", rental_id, "renew"), body=body))

    def release(self, rental_id: str, *, wait_s: float | None = None) -> Rental:
        """Repeatable, and so repeated over a broken connection. With `wait_s`, waits for its end: look at `state`."""
        reply = self._transport.send(
            "DELETE",
            _path("rentals", rental_id),
            params={"wait_s": wait_s},
            wait_s=wait_s or 0,
            retry_for_s=RENT_RETRY_S,
        )
        return _read(Rental, reply)

    def start(self, rental_id: str) -> Rental:
        """Run its start command now, also one that is not run any more."""
        return _read(Rental, self._transport.send("POST", _path("rentals", rental_id, "start")))

    def thaw(self, rental_id: str) -> Rental:
        """Let it go on for a while though its home holds more than it may, to make room."""
        return _read(Rental, self._transport.send("POST", _path("rentals", rental_id, "thaw")))

    def migrate(self, rental_id: str, *, wait_s: float | None = None) -> Rental:
        """Move it to another worker. With `wait_s`, waits until it is there: look at `moving_to` and `state`.

        Raises Conflict when it cannot be moved; then it goes on where it is. Not repeated over a broken connection: it
        may have been moved by then, and would be again.
        """
        path = _path("rentals", rental_id, "migrate")
        return _read(Rental, self._transport.send("POST", path, params={"wait_s": wait_s}, wait_s=wait_s or 0))

    def wait_until_moved(
        self, rental_id: str, within_s: float, on_change: Callable[[Rental], None] = lambda _rental: None
    ) -> Rental:
        """The rental once nothing of a move is under way any more, or as it is after `within_s`."""
        transport = self._transport
        give_up_at = transport.clock() + within_s
        while True:
            rental = self.wait_for(rental_id, RentalState.ACTIVE, max(0.0, give_up_at - transport.clock()), on_change)
            if (rental.moving_to is None and rental.state is RentalState.ACTIVE) or rental.state in ENDED:
                return rental
            if transport.clock() >= give_up_at:
                return rental
            transport.sleep(MOVE_POLL_S)

    def wait_until_drained(self, worker_id: str, on_change: Callable[[Worker], None] = lambda _worker: None) -> Worker:
        """The worker once it is drained, or is not draining any more. Waits through outages, however long it takes."""
        transport, failures = self._transport, 0
        while True:
            try:
                worker = self.worker(worker_id)
            except Retryable as error:
                failures += 1
                transport.pause(error, failures, transport.clock() + STREAM_RETRY_S)
                continue
            failures = 0
            on_change(worker)
            if worker.intent is not WorkerIntent.DRAINING:
                return worker
            transport.sleep(MOVE_POLL_S)

    def rental_log(self, rental_id: str) -> Iterator[LogEntry]:
        """What the engine did for it, oldest first."""
        return self._pages(LogEntry, _path("rentals", rental_id, "log"), {})

    def snapshots(self, rental_id: str) -> list[Snapshot]:
        """The copies of its files that are kept, oldest first."""
        return list(self._pages(Snapshot, _path("rentals", rental_id, "snapshots"), {}))

    def restore_files(
        self, rental_id: str, generation: str | None = None, *, empty: bool = False, discard: bool = False
    ) -> Rental:
        """Stop it, and have it begin again with that copy, or with nothing. It goes on by itself: look at `state`.

        What is there now is copied first; if that fails it is refused, unless `discard`.
        """
        body = _valid(RestoreRequest, generation=generation, empty=empty, discard=discard)
        path = _path("rentals", rental_id, "restore")
        return _read(Rental, self._transport.send("POST", path, body=body, wait_s=COPY_WAIT_S))

    # The way in

    def ssh_authority(self) -> SshAuthority:
        """By what ssh recognises the worker of any rental."""
        return _read(SshAuthority, self._transport.send("GET", "/api/ssh-authority"))

    def keys(self, rental_id: str) -> list[Key]:
        return list(self._pages(Key, _path("rentals", rental_id, "keys"), {}))

    def add_key(self, rental_id: str, ssh_public_key: str, wait_s: float = DEFAULT_WAIT_S) -> list[Key]:
        """All keys with it; look at `in_place`. Repeatable, and so repeated over a broken connection."""
        body = _valid(AddKeyRequest, ssh_public_key=ssh_public_key, wait_s=wait_s)
        reply = self._transport.send(
            "POST", _path("rentals", rental_id, "keys"), body=body, wait_s=wait_s, retry_for_s=RENT_RETRY_S
        )
        return _read(Page[Key], reply).items

    def remove_key(self, rental_id: str, key_id: str, wait_s: float = DEFAULT_WAIT_S) -> list[Key]:
        """All keys without it; look at `in_place`. Never the last one."""
        path = _path("rentals", rental_id, "keys", key_id)
        return _read(Page[Key], self._transport.send("DELETE", path, params={"wait_s": wait_s}, wait_s=wait_s)).items

    def certificate(self, rental_id: str, ssh_public_key: str, ttl_s: int = MAX_CERTIFICATE_S) -> CertificateReply:
        """A certificate for that key, which opens this rental for a while. Asked for twice, there are two."""
        body = _valid(CertificateRequest, ssh_public_key=ssh_public_key, ttl_s=ttl_s)
        path = _path("rentals", rental_id, "certificate")
        return _read(CertificateReply, self._transport.send("POST", path, body=body, retry_for_s=RENT_RETRY_S))

    def terminal_ticket(self, rental_id: str) -> TerminalTicket:
        """For one terminal in a browser: `terminal_url` makes the address of it."""
        return _read(TerminalTicket, self._transport.send("POST", _path("rentals", rental_id, "terminal")))

    def terminal_url(self, rental_id: str) -> str:
        """Opens a terminal in a browser, once, within a minute. What is behind the # no browser ever sends anywhere."""
        ticket = self.terminal_ticket(rental_id).ticket
        return f"{self.url}/terminal/#{quote(rental_id, safe='')}/{quote(ticket, safe='')}"

    # Web ports

    def public_ports(self, rental_id: str) -> list[WebPort]:
        return list(self._pages(WebPort, _path("rentals", rental_id, "ports"), {}))

    def expose(self, rental_id: str, port: int, public: bool) -> WebPort:
        """Open a web port to everybody, or to its owner alone again. Repeatable."""
        path = _path("rentals", rental_id, "ports", str(port))
        body = _valid(ExposeRequest, public=public)
        return _read(WebPort, self._transport.send("PUT", path, body=body, retry_for_s=RENT_RETRY_S))

    def web_port_ticket(self, rental_id: str, port: int) -> WebPortTicket:
        """For one browser: `opening_url` makes the address of it."""
        path = _path("rentals", rental_id, "ports", str(port), "ticket")
        return _read(WebPortTicket, self._transport.send("POST", path))

    def opening_url(self, rental_id: str, ticket: WebPortTicket, own_host: bool = True) -> str:
        """Opens the port in a browser, once, within a minute. What is behind the # no browser ever sends anywhere."""
        told = "/".join(quote(part, safe="") for part in (rental_id, str(ticket.port), ticket.ticket))
        return f"{self._base(ticket, own_host)}/.orion/open/#{told}"

    def port_url(self, port: WebPort, own_host: bool = True) -> str:
        """Where it is, for whoever may open it."""
        base = self._base(port, own_host)
        return f"{base}/" if base != self.url else f"{base}{port.path}"

    def _base(self, port: WebPort, own_host: bool) -> str:
        """A host name of its own keeps a page apart from everything else, as the sandbox of the other address does."""
        if port.host is None or not own_host:
            return self.url
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{port.host}{f':{parts.port}' if parts.port else ''}"

    # Workers

    def workers(self, *, limit: int | None = None) -> Iterator[Worker]:
        return self._pages(Worker, "/api/workers", {"limit": limit})

    def worker(self, worker_id: str) -> Worker:
        return _read(Worker, self._transport.send("GET", _path("workers", worker_id)))

    def find_worker(self, id_or_hostname: str) -> Worker:
        """By id, else by hostname: of several (a container that was made again), the one that is not down."""
        workers = list(self.workers())
        for worker in workers:
            if worker.id == id_or_hostname:
                return worker
        named = [worker for worker in workers if worker.hostname == id_or_hostname]
        if not named:
            raise NotFound(404, "not_found", f"there is no worker {id_or_hostname!r}: orion workers shows them")
        alive = [worker for worker in named if worker.health is not WorkerHealth.DOWN]
        return _only(alive or named, id_or_hostname, lambda one: f"{one.id} ({one.health})")

    def drain(self, worker_id: str) -> Worker:
        return _read(Worker, self._transport.send("POST", _path("workers", worker_id, "drain")))

    def drain_together(self, worker_ids: Iterable[str]) -> list[Worker]:
        """Drain several workers in the same moment: nothing is moved from one of them to another."""
        body = _valid(DrainRequest, worker_ids=list(worker_ids))
        return _read(Page[Worker], self._transport.send("POST", _path("workers", "drain"), body=body)).items

    def resume(self, worker_id: str, *, give_up: bool = False) -> Worker:
        """`give_up`: also end for good what it holds and the database has never placed."""
        query = {"give_up": "true" if give_up else None}
        return _read(Worker, self._transport.send("POST", _path("workers", worker_id, "resume"), params=query))

    def wait_until_ready(
        self, worker: Worker, within_s: float, on_change: Callable[[Worker], None] = lambda _worker: None
    ) -> Worker:
        """Return the worker once it is ready, or as it is after `within_s`, or once it was checked and quarantined."""
        transport, checked = self._transport, False
        give_up_at = transport.clock() + within_s
        while worker.health is not WorkerHealth.READY and transport.clock() < give_up_at:
            quarantined = worker.health is WorkerHealth.QUARANTINED
            if checked and quarantined:
                return worker
            checked = checked or not quarantined
            transport.sleep(MOVE_POLL_S)
            worker = self.worker(worker.id)
            on_change(worker)
        return worker

    def declare_gone(self, worker_id: str) -> Worker:
        """Say that the worker's container is not there any more: what ran there is taken over at once."""
        return _read(Worker, self._transport.send("POST", _path("workers", worker_id, "gone")))

    def prune_workers(self) -> Pruned:
        """Forget all workers that are down and of which nothing is missing."""
        return _read(Pruned, self._transport.send("POST", _path("workers", "prune")))

    def remove_worker(self, worker_id: str) -> None:
        self._transport.send("DELETE", _path("workers", worker_id))

    # Tokens

    def create_token(
        self, name: str, role: Literal["client", "admin", "join"] = "client", ttl_s: int | None = None
    ) -> TokenReply:
        body = _valid(TokenRequest, name=name, role=role, ttl_s=ttl_s)
        return _read(TokenReply, self._transport.send("POST", "/api/tokens", body=body))

    def tokens(self, *, limit: int | None = None) -> Iterator[Token]:
        return self._pages(Token, "/api/tokens", {"limit": limit})

    def find_token(self, id_or_name: str) -> Token:
        """By id, else by name among those not revoked."""
        tokens = list(self.tokens())
        for token in tokens:
            if token.id == id_or_name:
                return token
        named = [token for token in tokens if token.name == id_or_name and token.revoked_at is None]
        if not named:
            raise NotFound(404, "not_found", f"there is no token {id_or_name!r}: orion token ls shows them")
        return _only(named, id_or_name, lambda one: f"{one.id} ({one.role})")

    def revoke_token(self, token_id: str) -> None:
        self._transport.send("DELETE", _path("tokens", token_id))

    # Events

    def events(
        self,
        *,
        after: int | None = None,
        rental_id: str | None = None,
        worker_id: str | None = None,
        newest_first: bool = False,
        limit: int | None = None,
    ) -> Iterator[Event]:
        """Yield what happened so far, oldest first or from the end; pages of `limit` are asked for as they are needed.

        Only the newest events are kept: one of the kind `events.missed` says which of those after `after` are removed.
        """
        query = {"after": after, "rental_id": rental_id, "worker_id": worker_id, "limit": limit}
        query |= {"newest_first": "true" if newest_first else None}
        return self._pages(Event, "/api/events", query)

    def follow_events(
        self,
        *,
        after: int = 0,
        rental_id: str | None = None,
        worker_id: str | None = None,
        for_s: float | None = None,
    ) -> Iterator[Event]:
        """The events after `after`, then those to come, each once and in order, through broken connections.

        Ends after `for_s`. Raises Unreachable at the first connection, or when there was none for STREAM_RETRY_S.
        """
        transport = self._transport
        ends_at = transport.clock() + for_s if for_s is not None else float("inf")
        failures, give_up_at = 0, 0.0
        while transport.clock() < ends_at:
            try:
                for event in self._stream(after, rental_id, worker_id, ends_at):
                    failures = 0
                    give_up_at = transport.clock() + STREAM_RETRY_S
                    if event is not None:
                        after = event.id
                        yield event
                broken: Retryable = Unreachable(f"{self.url} ended the stream of events")
            except Retryable as error:
                broken = error
            if transport.clock() >= ends_at:
                return
            failures += 1
            transport.pause(broken, failures, give_up_at)

    def _stream(
        self, after: int, rental_id: str | None, worker_id: str | None, ends_at: float
    ) -> Iterator[Event | None]:
        """One connection: its events after `after`, and None at its opening and for what keeps it alive."""
        clock = self._transport.clock
        query = {"after": after, "rental_id": rental_id, "worker_id": worker_id}
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        silence_s = max(0.01, min(STREAM_SILENCE_S, ends_at - clock()))
        with self._transport.stream("/api/events", query, headers, silence_s) as body:
            yield None
            for data in messages(body):
                event = _event(data) if data is not None else None
                if event is None or event.id > after:
                    yield event
                if clock() >= ends_at:
                    return

    # The platform

    def status(self) -> Status:
        return _read(Status, self._transport.send("GET", "/api/status"))

    def backup(self, into: IO[bytes]) -> None:
        """A copy of the manager's database, whole when this returns. `into` is written as it comes."""
        with self._transport.stream("/api/admin/backup", {}, {}, ADMIN_WAIT_S) as body:
            for part in body:
                into.write(part)

    def plan_restore(self, backup: IO[bytes]) -> RestorePlan:
        """Hand a backup over, a file on the disk; nothing changes before `restore` accepts the plan."""
        reply = self._transport.upload("/api/admin/restore", backup, "application/vnd.sqlite3", ADMIN_WAIT_S)
        return _read(RestorePlan, reply)

    def restore(self, plan: RestorePlan) -> Restoring:
        """Go back to it. The manager restarts: it is away for some seconds."""
        return _read(Restoring, self._transport.send("POST", _path("admin", "restore", plan.id)))

    def confirm_clock(self) -> None:
        """Have the manager believe its clock as it is."""
        self._transport.send("POST", "/api/admin/clock")

    def healthz(self) -> None:
        """Raises unless the manager answers through the proxy."""
        self._transport.send("GET", "/healthz")

    def openapi(self) -> dict[str, Any]:
        reply = self._transport.send("GET", "/api/openapi.json")
        try:
            return dict(json.loads(reply.content))
        except (ValueError, TypeError) as error:
            raise UnreadableReply(f"{reply.url} is not an OpenAPI document") from error

    # What a worker calls: here for tests and measurements, the agent has its own

    def register(self, request: RegisterRequest) -> RegisterReply:
        return _read(RegisterReply, self._transport.send("POST", "/api/register", body=request))

    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatReply:
        return _read(HeartbeatReply, self._transport.send("POST", "/api/heartbeat", body=request))

    def _pages(self, model: type[_Model], path: str, query: dict[str, Any]) -> Iterator[_Model]:
        """Every item of a list, page by page."""
        while True:
            page = _read(Page[model], self._transport.send("GET", path, params=query))  # type: ignore[valid-type]
            yield from page.items
            if page.next is None or page.next == query.get("after"):
                return
            query = {**query, "after": page.next}


def _path(*parts: str) -> str:
    return "/".join(("/api", *(quote(part, safe="") for part in parts)))


def _valid(model: type[_Model], **fields: Any) -> _Model:
    """A request that the server could accept; what was not given is left out, so that its defaults are the server's."""
    try:
        return model(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{where} {in_words(first)}") from error


def _read(model: type[_Model], reply: httpx.Response) -> _Model:
    try:
        return model.model_validate_json(reply.content)
    except ValidationError as error:
        host = reply.url.copy_with(raw_path=b"/")
        raise UnreadableReply(
            f"{host} answered something else than Orion does: is it the right address and version?"
        ) from error


def _event(data: str) -> Event:
    try:
        return Event.model_validate_json(data)
    except ValidationError as error:
        raise UnreadableReply("the stream of events holds something else than an event") from error


_Named = TypeVar("_Named", Rental, Worker, Token)


def _only(found: list[_Named], name: str, describe: Callable[[_Named], str]) -> _Named:
    if len(found) > 1:
        listed = ", ".join(describe(one) for one in found)
        raise Ambiguous(f"{len(found)} are called {name!r}, give the id of one: {listed}", [one.id for one in found])
    return found[0]
