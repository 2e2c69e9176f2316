"""The Python SDK: one method for each call of the API. It takes and returns the models of `orion.wire`.

    with Orion.logged_in() as orion:
        rental = orion.rent(name="lab", ttl_s=3600, ssh_public_key=key)

The methods raise the exceptions of `orion.errors` and none of the HTTP library.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from orion import login as logins
from orion import wire
from orion.client.sse import messages
from orion.client.transport import HttpTransport, OnRetry
from orion.errors import Ambiguous, InvalidInput, NotFound, Retryable, Unreachable, UnreadableReply
from orion.login import Login

RENT_RETRY_S = 15.0  # seconds for which `rent` is sent again over a broken connection: longer than a manager's restart
STREAM_SILENCE_S = 45.0  # seconds without a byte after which a stream counts as broken; the server comments every 15 s
STREAM_RETRY_S = 300.0  # seconds for which a broken event stream, or a wait for a drain, is tried again
POLL_S = 10.0  # seconds that one request of `wait_for` waits on the server, at most
MIGRATION_POLL_S = 0.5  # seconds between two requests for a migration, a drain or a check of a worker
SNAPSHOT_WAIT_S = 45.0  # seconds to wait for the snapshot of a home that `restore_files` makes first
ADMIN_WAIT_S = 600.0  # seconds to wait for the copy of a large database
ENDED = frozenset({wire.RentalState.RELEASED, wire.RentalState.EXPIRED, wire.RentalState.FAILED})

_ID = re.compile(r"[a-z0-9-]{1,64}")
_Model = TypeVar("_Model", bound=BaseModel)
_Named = TypeVar("_Named", wire.Rental, wire.Worker, wire.Token)
OnRental = Callable[[wire.Rental], None]
OnWorker = Callable[[wire.Worker], None]


class Orion:
    """A connection to one platform, for one thread at a time. `transport` are more arguments of HttpTransport."""

    def __init__(self, login: Login, **transport: Any) -> None:
        self.url = login.url
        self._transport = HttpTransport(login, **transport)

    @classmethod
    def at(cls, url: str, token: str, ca_file: str | None = None) -> Orion:
        """Return a connection to the platform at this address. `ca_file` is the only certificate to trust, in PEM."""
        return cls(Login(logins.clean_url(url), logins.clean_token(token), ca_file))

    @classmethod
    def logged_in(cls) -> Orion:
        """Return a connection with the login of this user or of the environment (see `orion.login.load`)."""
        return cls(logins.load())

    def __enter__(self) -> Orion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections to the platform."""
        self._transport.close()

    def when_retrying(self, on_retry: OnRetry) -> None:
        """Call `on_retry(error, pause_s)` before each pause from now on, for instance to inform a person."""
        self._transport.on_retry = on_retry

    def be_patient(self, for_s: float) -> None:
        """Repeat each read for `for_s` seconds while the platform does not answer, as during its restart."""
        self._transport.patience_s = for_s

    # Rentals

    def rent(
        self,
        *,
        name: str | None = None,
        ssh_public_key: str | None = None,
        ttl_s: int = wire.DEFAULT_TTL_S,
        labels: dict[str, str] | None = None,
        start: str | None = None,
        wait_s: float = wire.DEFAULT_WAIT_S,
        idempotency_key: str | None = None,
        retry_for_s: float = RENT_RETRY_S,
    ) -> wire.RentReply:
        """Rent an environment. Check `state` in the reply: the rental may still be queued after `wait_s`.

        The request is repeated over a broken connection with the same idempotency key, so it never makes two rentals.
        Without `ssh_public_key` the server makes a key pair and returns its private half in this reply alone.
        `start` is a command that the rental's shell runs each time that the rental becomes active on a worker.
        """
        fields = {"name": name, "ssh_public_key": ssh_public_key, "ttl_s": ttl_s, "start": start, "wait_s": wait_s}
        body = _valid(wire.RentRequest, **fields, labels=labels or {})
        headers = {"Idempotency-Key": idempotency_key or secrets.token_urlsafe(24)}
        return self._call(
            wire.RentReply, "POST", "rent", body=body, headers=headers, wait_s=wait_s, retry_for_s=retry_for_s
        )

    def rentals(
        self, *, name: str | None = None, ended: bool = False, mine: bool = False, limit: int | None = None
    ) -> Iterator[wire.Rental]:
        """Yield the living rentals, or all with `ended`. `mine` leaves out other people's, which an admin sees."""
        return self._pages(wire.Rental, "rentals", name=name, ended=_flag(ended), mine=_flag(mine), limit=limit)

    def rental(
        self, rental_id: str, *, wait_s: float | None = None, state: wire.RentalState | None = None
    ) -> wire.Rental:
        """Return the rental. With `wait_s` and `state`, first wait until it is in that state or has ended."""
        query = {"wait_s": wait_s, "state": state.value if state else None}
        return self._call(wire.Rental, "GET", "rentals", rental_id, params=query, wait_s=wait_s or 0)

    def find_rental(self, id_or_name: str, *, ended: bool = False) -> wire.Rental:
        """Return the rental of this id, else the living one of this name, else (with `ended`) the latest of this name.

        An admin sees other people's rentals too; among several of one name, the admin's own goes first.
        """
        if _ID.fullmatch(id_or_name):
            try:
                return self.rental(id_or_name)
            except NotFound:
                pass
            if living := self._named(id_or_name, ended=False):
                return _only(living, id_or_name, lambda one: f"{one.id} of {one.owner}")
            if ended and (past := self._named(id_or_name, ended=True)):
                return max(past, key=lambda one: one.created_at)
        raise NotFound(404, "not_found", f"there is no rental {id_or_name!r}. List your rentals with: orion ls")

    def _named(self, name: str, ended: bool) -> list[wire.Rental]:
        """Return the rentals of this name: only own ones if other people have rentals of this name, too."""
        found = list(self.rentals(name=name, ended=ended))
        if len({one.owner for one in found}) > 1:
            return list(self.rentals(name=name, ended=ended, mine=True)) or found
        return found

    def wait_for(
        self, rental_id: str, state: wire.RentalState, within_s: float, on_change: OnRental = lambda _rental: None
    ) -> wire.Rental:
        """Return the rental once it is in `state` or has ended, or as it is after `within_s`. Wait through outages."""
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
            # If a server answers a long poll at once, pause instead of asking in a tight loop.
            transport.sleep(max(0.0, min(0.5 - (now - asked_at), give_up_at - now)))

    def renew(self, rental_id: str, ttl_s: int = wire.DEFAULT_TTL_S) -> wire.Rental:
        """Let the rental end `ttl_s` seconds from now."""
        body = _valid(wire.RenewRequest, ttl_s=ttl_s)
        return self._call(wire.Rental, "POST", "rentals", rental_id, "renew", body=body)

    def release(self, rental_id: str, *, wait_s: float | None = None) -> wire.Rental:
        """End the rental. With `wait_s`, wait until it has ended: check `state`. Retry over a broken connection."""
        waits: dict[str, Any] = {"params": {"wait_s": wait_s}, "wait_s": wait_s or 0, "retry_for_s": RENT_RETRY_S}
        return self._call(wire.Rental, "DELETE", "rentals", rental_id, **waits)

    def start(self, rental_id: str) -> wire.Rental:
        """Run the rental's start command now, even if the platform no longer runs it by itself."""
        return self._call(wire.Rental, "POST", "rentals", rental_id, "start")

    def thaw(self, rental_id: str) -> wire.Rental:
        """Thaw a rental whose home exceeds its limit, so that its owner can remove files."""
        return self._call(wire.Rental, "POST", "rentals", rental_id, "thaw")

    def migrate(self, rental_id: str, *, wait_s: float | None = None) -> wire.Rental:
        """Migrate the rental to another worker. With `wait_s`, wait until it is there: check `moving_to` and `state`.

        Raise Conflict if it cannot be migrated; then it stays on its worker. The request is not sent again over a
        broken connection, because the rental may have been migrated by then and would be migrated once more.
        """
        query = {"wait_s": wait_s}
        return self._call(wire.Rental, "POST", "rentals", rental_id, "migrate", params=query, wait_s=wait_s or 0)

    def wait_until_moved(
        self, rental_id: str, within_s: float, on_change: OnRental = lambda _rental: None
    ) -> wire.Rental:
        """Return the rental once its migration is over, or as it is after `within_s`."""
        clock, active = self._transport.clock, wire.RentalState.ACTIVE
        give_up_at = clock() + within_s
        while True:
            rental = self.wait_for(rental_id, active, max(0.0, give_up_at - clock()), on_change)
            is_over = rental.moving_to is None and rental.state is active
            if is_over or rental.state in ENDED or clock() >= give_up_at:
                return rental
            self._transport.sleep(MIGRATION_POLL_S)

    def wait_until_drained(self, worker_id: str, on_change: OnWorker = lambda _worker: None) -> wire.Worker:
        """Return the worker once it is drained or no longer draining. Wait without a limit, and through outages."""
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
            if worker.intent is not wire.WorkerIntent.DRAINING:
                return worker
            transport.sleep(MIGRATION_POLL_S)

    def rental_log(self, rental_id: str) -> Iterator[wire.LogEntry]:
        """Yield the provisioning jobs of the rental, oldest first."""
        return self._pages(wire.LogEntry, "rentals", rental_id, "log")

    def snapshots(self, rental_id: str) -> list[wire.Snapshot]:
        """Return the kept snapshots of the rental's home, oldest first."""
        return list(self._pages(wire.Snapshot, "rentals", rental_id, "snapshots"))

    def restore_files(
        self, rental_id: str, generation: str | None = None, *, empty: bool = False, discard: bool = False
    ) -> wire.Rental:
        """Stop the rental and start it again with the snapshot `generation`, or with an empty home.

        The restore continues after this returns: check `state`. The platform first makes a snapshot of the present
        files, and refuses the restore if that fails, unless `discard` is given.
        """
        body = _valid(wire.RestoreRequest, generation=generation, empty=empty, discard=discard)
        return self._call(wire.Rental, "POST", "rentals", rental_id, "restore", body=body, wait_s=SNAPSHOT_WAIT_S)

    # Access to a rental

    def ssh_authority(self) -> wire.SshAuthority:
        """Return the authority whose host certificates let ssh verify the worker of any rental."""
        return self._call(wire.SshAuthority, "GET", "ssh-authority")

    def keys(self, rental_id: str) -> list[wire.Key]:
        """Return the SSH keys that open the rental."""
        return list(self._pages(wire.Key, "rentals", rental_id, "keys"))

    def add_key(self, rental_id: str, ssh_public_key: str, wait_s: float = wire.DEFAULT_WAIT_S) -> list[wire.Key]:
        """Add a key and return all; `in_place` tells whether the worker has them. Retry over a broken connection."""
        body = _valid(wire.AddKeyRequest, ssh_public_key=ssh_public_key, wait_s=wait_s)
        waits = {"wait_s": wait_s, "retry_for_s": RENT_RETRY_S}
        return self._call(wire.Page[wire.Key], "POST", "rentals", rental_id, "keys", body=body, **waits).items

    def remove_key(self, rental_id: str, key_id: str, wait_s: float = wire.DEFAULT_WAIT_S) -> list[wire.Key]:
        """Remove a key and return the others; `in_place` tells whether the worker has them. The last key stays."""
        path, query = ("rentals", rental_id, "keys", key_id), {"wait_s": wait_s}
        return self._call(wire.Page[wire.Key], "DELETE", *path, params=query, wait_s=wait_s).items

    def certificate(
        self, rental_id: str, ssh_public_key: str, ttl_s: int = wire.MAX_CERTIFICATE_S
    ) -> wire.CertificateReply:
        """Return a certificate that lets the key open this rental for `ttl_s` seconds. Each call makes a new one."""
        body = _valid(wire.CertificateRequest, ssh_public_key=ssh_public_key, ttl_s=ttl_s)
        path = ("rentals", rental_id, "certificate")
        return self._call(wire.CertificateReply, "POST", *path, body=body, retry_for_s=RENT_RETRY_S)

    def terminal_ticket(self, rental_id: str) -> wire.TerminalTicket:
        """Return a ticket that opens one terminal in a browser; `terminal_url` returns its address."""
        return self._call(wire.TerminalTicket, "POST", "rentals", rental_id, "terminal")

    def terminal_url(self, rental_id: str) -> str:
        """Return an address that opens a terminal in a browser, once, within a minute."""
        return f"{self.url}/terminal/#{_quoted(rental_id, self.terminal_ticket(rental_id).ticket)}"

    # Web ports

    def public_ports(self, rental_id: str) -> list[wire.WebPort]:
        """Return the web ports of the rental that anybody may open."""
        return list(self._pages(wire.WebPort, "rentals", rental_id, "ports"))

    def expose(self, rental_id: str, port: int, public: bool) -> wire.WebPort:
        """Open a web port to everybody, or to the rental's owner alone. The request is repeatable."""
        path, body = ("rentals", rental_id, "ports", str(port)), _valid(wire.ExposeRequest, public=public)
        return self._call(wire.WebPort, "PUT", *path, body=body, retry_for_s=RENT_RETRY_S)

    def web_port_ticket(self, rental_id: str, port: int) -> wire.WebPortTicket:
        """Return a ticket that opens the web port in one browser; `opening_url` returns its address."""
        return self._call(wire.WebPortTicket, "POST", "rentals", rental_id, "ports", str(port), "ticket")

    def opening_url(self, rental_id: str, ticket: wire.WebPortTicket, own_host: bool = True) -> str:
        """Return an address that opens the port in a browser, once, within a minute."""
        # The ticket follows the #, because browsers do not send that part of an address to any server.
        return f"{self._base(ticket, own_host)}/.orion/open/#{_quoted(rental_id, str(ticket.port), ticket.ticket)}"

    def port_url(self, port: wire.WebPort, own_host: bool = True) -> str:
        """Return the port's address, for those who may open it."""
        base = self._base(port, own_host)
        return f"{base}/" if base != self.url else f"{base}{port.path}"

    def _base(self, port: wire.WebPort, own_host: bool) -> str:
        """Return the platform's address with the port's own host name, if there is one and the caller wants it."""
        if port.host is None or not own_host:
            return self.url
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{port.host}{f':{parts.port}' if parts.port else ''}"

    # Workers

    def workers(self, *, limit: int | None = None) -> Iterator[wire.Worker]:
        """Yield all workers; ask for pages of `limit`."""
        return self._pages(wire.Worker, "workers", limit=limit)

    def worker(self, worker_id: str) -> wire.Worker:
        """Return the worker of this id."""
        return self._call(wire.Worker, "GET", "workers", worker_id)

    def find_worker(self, id_or_hostname: str) -> wire.Worker:
        """Return the worker of this id, else of this hostname: if several have it, the one that is not down."""
        workers = list(self.workers())
        if same_id := [worker for worker in workers if worker.id == id_or_hostname]:
            return same_id[0]
        named = [worker for worker in workers if worker.hostname == id_or_hostname]
        if not named:
            raise NotFound(404, "not_found", f"there is no worker {id_or_hostname!r}. List them with: orion workers")
        alive = [worker for worker in named if worker.health is not wire.WorkerHealth.DOWN]
        return _only(alive or named, id_or_hostname, lambda one: f"{one.id} ({one.health})")

    def drain(self, worker_id: str) -> wire.Worker:
        """Migrate all rentals away from the worker and place no new ones on it."""
        return self._call(wire.Worker, "POST", "workers", worker_id, "drain")

    def drain_together(self, worker_ids: Iterable[str]) -> list[wire.Worker]:
        """Drain several workers at once, so that no rental is migrated from one of them to another."""
        body = _valid(wire.DrainRequest, worker_ids=list(worker_ids))
        return self._call(wire.Page[wire.Worker], "POST", "workers", "drain", body=body).items

    def resume(self, worker_id: str, *, give_up: bool = False) -> wire.Worker:
        """Let the worker take rentals again. `give_up` also deletes its unknown rentals, with all their files."""
        return self._call(wire.Worker, "POST", "workers", worker_id, "resume", params={"give_up": _flag(give_up)})

    def wait_until_ready(
        self, worker: wire.Worker, within_s: float, on_change: OnWorker = lambda _worker: None
    ) -> wire.Worker:
        """Return the worker once it is ready, or once a check quarantines it, or as it is after `within_s`."""
        transport, checked = self._transport, False
        give_up_at = transport.clock() + within_s
        while worker.health is not wire.WorkerHealth.READY and transport.clock() < give_up_at:
            quarantined = worker.health is wire.WorkerHealth.QUARANTINED
            if checked and quarantined:
                return worker
            checked = checked or not quarantined
            transport.sleep(MIGRATION_POLL_S)
            worker = self.worker(worker.id)
            on_change(worker)
        return worker

    def declare_gone(self, worker_id: str) -> wire.Worker:
        """Declare that the worker's container does not exist any more, so that its rentals are taken over at once."""
        return self._call(wire.Worker, "POST", "workers", worker_id, "gone")

    def prune_workers(self) -> wire.Pruned:
        """Forget all workers that are down and have nothing that a rental still needs."""
        return self._call(wire.Pruned, "POST", "workers", "prune")

    def remove_worker(self, worker_id: str) -> None:
        """Forget a worker."""
        self._transport.send("DELETE", _path("workers", worker_id))

    # Tokens

    def create_token(
        self, name: str, role: Literal["client", "admin", "join"] = "client", ttl_s: int | None = None
    ) -> wire.TokenReply:
        """Make a token; without `ttl_s` it is valid until it is revoked."""
        body = _valid(wire.TokenRequest, name=name, role=role, ttl_s=ttl_s)
        return self._call(wire.TokenReply, "POST", "tokens", body=body)

    def tokens(self, *, limit: int | None = None) -> Iterator[wire.Token]:
        """Yield all tokens without their secrets; ask for pages of `limit`."""
        return self._pages(wire.Token, "tokens", limit=limit)

    def find_token(self, id_or_name: str) -> wire.Token:
        """Return the token of this id, else the valid one of this name."""
        tokens = list(self.tokens())
        if same_id := [token for token in tokens if token.id == id_or_name]:
            return same_id[0]
        named = [token for token in tokens if token.name == id_or_name and token.revoked_at is None]
        if not named:
            raise NotFound(404, "not_found", f"there is no token {id_or_name!r}. List them with: orion token ls")
        return _only(named, id_or_name, lambda one: f"{one.id} ({one.role})")

    def revoke_token(self, token_id: str) -> None:
        """Revoke a token at once."""
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
    ) -> Iterator[wire.Event]:
        """Yield the past events, oldest or newest first; ask for pages of `limit` as they are needed.

        The platform keeps the newest events only. An event `events.missed` says which ones after `after` were removed.
        """
        query = {"after": after, "rental_id": rental_id, "worker_id": worker_id, "limit": limit}
        return self._pages(wire.Event, "events", **query, newest_first=_flag(newest_first))

    def follow_events(
        self, *, after: int = 0, rental_id: str | None = None, worker_id: str | None = None, for_s: float | None = None
    ) -> Iterator[wire.Event]:
        """Yield the events after `after`, then new ones, each once and in order, through broken connections.

        The iterator ends after `for_s`. It raises Unreachable if the first connection fails, or if there was no
        connection for STREAM_RETRY_S.
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
    ) -> Iterator[wire.Event | None]:
        """Yield the events after `after` of one connection, and None when it opens and for each comment."""
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

    def status(self) -> wire.Status:
        """Return the state of the whole platform."""
        return self._call(wire.Status, "GET", "status")

    def backup(self, into: IO[bytes]) -> None:
        """Write a copy of the manager's database to `into`. The copy is complete when this returns."""
        with self._transport.stream("/api/admin/backup", {}, {}, ADMIN_WAIT_S) as body:
            for part in body:
                into.write(part)

    def plan_restore(self, backup: IO[bytes]) -> wire.RestorePlan:
        """Upload a backup and return what restoring it would do. Nothing changes before `restore` accepts the plan."""
        reply = self._transport.upload("/api/admin/restore", backup, "application/vnd.sqlite3", ADMIN_WAIT_S)
        return _read(wire.RestorePlan, reply)

    def restore(self, plan: wire.RestorePlan) -> wire.Restoring:
        """Restore the backup of this plan. The manager restarts and does not answer for some seconds."""
        return self._call(wire.Restoring, "POST", "admin", "restore", plan.id)

    def confirm_clock(self) -> None:
        """Let the manager trust its clock as it is."""
        self._transport.send("POST", "/api/admin/clock")

    def healthz(self) -> None:
        """Raise an error if the manager does not answer through the proxy."""
        self._transport.send("GET", "/healthz")

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document of the platform."""
        reply = self._transport.send("GET", "/api/openapi.json")
        try:
            return dict(json.loads(reply.content))
        except (ValueError, TypeError) as error:
            raise UnreadableReply(f"{reply.url} is not an OpenAPI document") from error

    # Calls of a worker, for tests and benchmarks: the agent on a worker has its own client

    def register(self, request: wire.RegisterRequest) -> wire.RegisterReply:
        """Register a worker."""
        return self._call(wire.RegisterReply, "POST", "register", body=request)

    def heartbeat(self, request: wire.HeartbeatRequest) -> wire.HeartbeatReply:
        """Send one heartbeat of a worker."""
        return self._call(wire.HeartbeatReply, "POST", "heartbeat", body=request)

    def _call(self, model: type[_Model], method: str, *path: str, **more: Any) -> _Model:
        """Send a request to this path below /api. `more` are the keyword arguments of `HttpTransport.send`."""
        return _read(model, self._transport.send(method, _path(*path), **more))

    def _pages(self, model: type[_Model], *path: str, **query: str | float | None) -> Iterator[_Model]:
        """Yield every item of a list, page by page."""
        while True:
            page = self._call(wire.Page[model], "GET", *path, params=query)  # type: ignore[valid-type]
            yield from page.items
            if page.next is None or page.next == query.get("after"):
                return
            query = {**query, "after": page.next}


def _path(*parts: str) -> str:
    return f"/api/{_quoted(*parts)}"


def _quoted(*parts: str) -> str:
    return "/".join(quote(part, safe="") for part in parts)


def _valid(model: type[_Model], **fields: Any) -> _Model:
    """Return a request without fields that are None. Raise InvalidInput if the server would refuse a value."""
    try:
        return model(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{where} {wire.in_words(first)}") from error


def _read(model: type[_Model], reply: httpx.Response) -> _Model:
    try:
        return model.model_validate_json(reply.content)
    except ValidationError as error:
        host = reply.url.copy_with(raw_path=b"/")
        detail = f"{host} did not answer as Orion does. Check that it is the right address and version"
        raise UnreadableReply(detail) from error


def _event(data: str) -> wire.Event:
    try:
        return wire.Event.model_validate_json(data)
    except ValidationError as error:
        raise UnreadableReply("the stream of events contains something that is not an event") from error


def _flag(value: bool) -> str | None:
    return "true" if value else None


def _only(found: list[_Named], name: str, describe: Callable[[_Named], str]) -> _Named:
    if len(found) > 1:
        listed = ", ".join(describe(one) for one in found)
        raise Ambiguous(f"{len(found)} have the name {name!r}. Give the id of one: {listed}", [one.id for one in found])
    return found[0]
