"""What the manager and the engine's process say to each other over a Unix socket, by channel.py.

The engine checks what it is told as if the manager were a stranger: it alone holds the SSH key of the workers. The
lines at the end are what the engine's own processes say to each other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, IPvAnyAddress, StringConstraints

from orion.manager.engine.port import OF_ONE_BOOT, Action, Host, Job, Outcome
from orion.wire import Id, Name, PublicKey, StartCommand

MAX_DEADLINE_S = 3600.0

WorkerId = Annotated[str, StringConstraints(pattern=r"^w-[a-z0-9]{1,30}$")]
Certificate = Annotated[
    str, StringConstraints(pattern=r"^(ssh-ed25519-cert-v01@openssh\.com [A-Za-z0-9+/]{20,16384}={0,3})?$")
]
Username = Annotated[str, StringConstraints(pattern=r"^r-[a-z0-9]{1,30}$")]


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HostLine(Line):
    """An address is never a name: OpenSSH would take one that begins with a dash for an option."""

    worker_id: WorkerId
    address: IPvAnyAddress
    port: int = Field(22, ge=1, le=65535)
    host_keys: Annotated[tuple[PublicKey, ...], Field(min_length=1, max_length=8)]

    def host(self) -> Host:
        return Host(self.worker_id, str(self.address), self.host_keys, self.port)


class Variables(Line):
    """The playbooks' extra variables: no other name is let through, so none can change how Ansible works."""

    rental_id: Id
    username: Username
    uid: int = Field(ge=100_000, lt=2**31)
    epoch: int = Field(ge=1, lt=2**53)
    public_keys: Annotated[tuple[PublicKey, ...], Field(max_length=64)] = ()
    start: StartCommand | None = None
    start_mark: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,16}@[A-Za-z0-9-]{0,64}$")] | None = None
    rental_name: Name | None = None
    user_authority: PublicKey | Literal[""] = ""
    host_certificate: Certificate = ""
    move: int = Field(0, ge=0, lt=2**53)
    boot_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{8,64}$")] | None = None
    """Left out for a worker from before there were such orders: it refuses what it does not know."""


class JobLine(Line):
    id: Id
    action: Action
    host: HostLine
    vars: Variables
    deadline_s: float = Field(gt=0, le=MAX_DEADLINE_S)
    owner: str = Field("", max_length=200)
    """The owner of the rental, for its share of the runners; empty: of what only an inventory knows."""


class ExpectLine(Line):
    """Orders to this worker are to come: its connection may be opened. It is not answered."""

    expect: HostLine


class OutcomeLine(Line):
    """`id` is empty where the request was no request."""

    id: str
    ok: bool
    message: str = ""
    report: dict[str, Any] = {}

    def outcome(self) -> Outcome:
        return Outcome(self.ok, self.message, self.report)


class Order(Line):
    """One job in a batch. `number`: the engine's own for it."""

    number: int
    vars: Variables
    refused_after: float
    """The wall clock's time after which the worker must refuse it."""


class HostOrders(Line):
    host: HostLine
    orders: tuple[Order, ...]
    connection: int
    """The number of the connection that the engine has open to it."""


class BatchLine(Line):
    """One run of one playbook over these hosts, which are all different."""

    action: Action
    hosts: tuple[HostOrders, ...]


class ResultLine(Line):
    """What came of one order; one with `finished` says that the whole run has ended."""

    number: int = 0
    ok: bool = True
    message: str = ""
    report: dict[str, Any] = {}
    unreachable: bool = False
    finished: bool = False


def job_line(identifier: str, job: Job) -> JobLine:
    """Return the request for a job. Raise ValueError for one that the engine would refuse."""
    return JobLine(
        id=identifier,
        action=job.action,
        host=_host_line(job.host),
        vars=Variables(
            rental_id=job.rental_id,
            username=job.username,
            uid=job.uid,
            epoch=job.epoch,
            public_keys=job.public_keys,
            start=job.start or None,
            start_mark=job.start_mark or None,
            rental_name=job.rental_name or None,
            user_authority=job.user_authority,
            host_certificate=job.host_certificate,
            move=job.move,
            boot_id=job.host.boot_id or None if job.action in OF_ONE_BOOT else None,
        ),
        deadline_s=job.deadline_s,
        owner=job.owner,
    )


def expect_line(host: Host) -> ExpectLine:
    """Return the word that orders to this host are to come. Raise ValueError for one that the engine would refuse."""
    return ExpectLine(expect=_host_line(host))


def _host_line(host: Host) -> HostLine:
    return HostLine(worker_id=host.worker_id, address=host.address, port=host.port, host_keys=host.host_keys)
