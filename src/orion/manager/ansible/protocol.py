"""Messages between the manager and the engine's process over a Unix socket (channel.py).

The engine checks each message and does not trust the manager, because it alone holds the SSH key of the workers. The
messages from BatchOrder on are between the engine's own processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from orion.manager.ansible.port import OF_ONE_BOOT, Action, Job
from orion.manager.messages import MAX_DEADLINE_S, HostMessage, Message
from orion.rental_order import InvalidOrder, RentalOrder
from orion.wire import Id, one_public_key


def _checked(value: object) -> RentalOrder:
    """Return the order with its keys as plain as wire.PublicKey makes them. Raise ValidationError if it is invalid."""
    try:
        order = RentalOrder.from_json(value.as_json() if isinstance(value, RentalOrder) else value)
        for name in ("username", "uid"):
            if not getattr(order, name):
                raise InvalidOrder(name, "is missing")
        if order.kill or order.deadline is not None:
            raise InvalidOrder("kill" if order.kill else "deadline", "is not for the manager to say")
        return _with_plain_keys(order)
    except InvalidOrder as error:
        # A ValidationError keeps the name of the field; of another ValueError pydantic would keep the message alone.
        problem = PydanticCustomError("invalid_order", "{problem}", {"problem": error.problem})
        raise ValidationError.from_exception_data(
            "RentalOrder", [{"type": problem, "loc": (error.field,), "input": None}]
        ) from error


def _with_plain_keys(order: RentalOrder) -> RentalOrder:
    """Raise InvalidOrder if the data of a key is damaged or weak, which the worker does not look at."""
    plain = {}
    for name, keys in (("public_keys", order.public_keys), ("user_authority", (order.user_authority,))):
        try:
            plain[name] = tuple(one_public_key(key) for key in keys if key)
        except ValueError as error:
            raise InvalidOrder(name, str(error)) from error
    return replace(order, public_keys=plain["public_keys"], user_authority="".join(plain["user_authority"]))


UNREACHABLE = "the worker cannot be reached by SSH: "

Order = Annotated[
    RentalOrder, PlainValidator(_checked), PlainSerializer(RentalOrder.as_json, return_type=dict[str, Any])
]
"""An order as JSON. A field of another name is refused, so none can change how Ansible works."""


class JobMessage(Message):
    id: Id
    action: Action
    host: HostMessage
    order: Order
    deadline_s: float = Field(gt=0, le=MAX_DEADLINE_S)
    owner: str = Field("", max_length=200)
    """The owner of the rental, for its share of the runners; empty if only an inventory knows the rental."""


class ExpectMessage(Message):
    """A request to open the connection to this worker, because orders will follow. It gets no answer."""

    expect: HostMessage


class OutcomeMessage(Message):
    """The answer to a job. `id` is empty if the request was not valid."""

    id: str
    ok: bool
    message: str = ""
    report: dict[str, Any] = Field(default_factory=dict)


class BatchOrder(Message):
    """One job in a batch. `number`: the engine's own for it."""

    number: int
    order: Order
    refused_after: float
    """The Unix seconds after which the worker refuses it."""

    def as_json(self) -> dict[str, Any]:
        """Return the order in the form in which the worker gets it."""
        return replace(self.order, deadline=self.refused_after).as_json()


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
        host=HostMessage.of(job.host),
        order=replace(job.order, boot_id=job.host.boot_id if job.action in OF_ONE_BOOT else ""),
        deadline_s=job.deadline_s,
        owner=job.owner,
    )
