"""Messages between the manager and the engine's process over a Unix socket (channel.py).

The engine checks each message and does not trust the manager, because it alone holds the SSH key of the workers. The
messages from BatchOrder on are between the engine's own processes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from orion.manager.ansible.port import OF_ONE_BOOT, Action, Job, Outcome
from orion.manager.messages import MAX_DEADLINE_S, HostMessage, Message
from orion.manager.ssh.port import Host
from orion.wire import Id, Name, PublicKey, StartCommand

Certificate = Annotated[
    str, StringConstraints(pattern=r"^(ssh-ed25519-cert-v01@openssh\.com [A-Za-z0-9+/]{20,16384}={0,3})?$")
]
Username = Annotated[str, StringConstraints(pattern=r"^r-[a-z0-9]{1,30}$")]


class Variables(Message):
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


class JobMessage(Message):
    id: Id
    action: Action
    host: HostMessage
    vars: Variables
    deadline_s: float = Field(gt=0, le=MAX_DEADLINE_S)
    owner: str = Field("", max_length=200)
    """The owner of the rental, for its share of the runners; empty: of what only an inventory knows."""


class ExpectMessage(Message):
    """Tells the engine to open its connection to this worker, because orders will follow. It gets no answer."""

    expect: HostMessage


class OutcomeMessage(Message):
    """The answer to a job. `id` is empty if the request was not valid."""

    id: str
    ok: bool
    message: str = ""
    report: dict[str, Any] = Field(default_factory=dict)

    def outcome(self) -> Outcome:
        return Outcome(self.ok, self.message, self.report)


class BatchOrder(Message):
    """One job in a batch. `number`: the engine's own for it."""

    number: int
    vars: Variables
    refused_after: float
    """The wall clock's time after which the worker must refuse it."""


class HostOrders(Message):
    host: HostMessage
    orders: tuple[BatchOrder, ...]
    connection: int
    """The number of the connection that the engine has open to it."""


class BatchMessage(Message):
    """One run of one playbook over these hosts, which are all different."""

    action: Action
    hosts: tuple[HostOrders, ...]


class ResultMessage(Message):
    """The result of one order; `finished` marks the end of the whole run."""

    number: int = 0
    ok: bool = True
    message: str = ""
    report: dict[str, Any] = Field(default_factory=dict)
    unreachable: bool = False
    finished: bool = False


def job_message(identifier: str, job: Job) -> JobMessage:
    """Return the request for a job. Raise ValueError for one that the engine would refuse."""
    return JobMessage(
        id=identifier,
        action=job.action,
        host=_host_message(job.host),
        vars=Variables(
            rental_id=job.order.rental_id,
            username=job.order.username,
            uid=job.order.uid,
            epoch=job.order.epoch,
            public_keys=job.order.public_keys,
            start=job.order.start or None,
            start_mark=job.order.start_mark or None,
            rental_name=job.order.rental_name or None,
            user_authority=job.order.user_authority,
            host_certificate=job.order.host_certificate,
            move=job.order.move,
            boot_id=job.host.boot_id or None if job.action in OF_ONE_BOOT else None,
        ),
        deadline_s=job.deadline_s,
        owner=job.owner,
    )


def expect_message(host: Host) -> ExpectMessage:
    """Return the message that orders to this host will follow. Raise ValueError if the engine would refuse it."""
    return ExpectMessage(expect=_host_message(host))


def _host_message(host: Host) -> HostMessage:
    return HostMessage(worker_id=host.worker_id, address=host.address, port=host.port, host_keys=host.host_keys)
