"""The order that the manager gives a worker for one rental: the only declaration of each of its fields.

The manager, the Ansible action, its documentation and `orion-rental` share this module, which uses the standard library
only and imports nothing slow. The engine and the worker check every order by it. A worker refuses an unknown field,
so an order leaves out empty ones, except those with `sent_empty`, which every released worker knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

COMMANDS = ("run", "create", "certify", "lock", "unlock", "freeze", "thaw", "purge")
"""The commands of `orion-rental` that take an order."""
FIRST_UID = 100_000
MAX_START = 1000  # characters of a start command, at most
MAX_PUBLIC_KEYS = 64

_ACCOUNT = ("run", "create", "purge")
_KEYS = ("run", "create")
_PUBLIC_KEY = r"[a-z0-9@.-]+ [A-Za-z0-9+/]{20,8000}={0,3}( [\x20-\x7e]{0,200})?"


class InvalidOrder(ValueError):
    """The error for a field that is wrong or unknown. The message names the field and never quotes its value."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}".lstrip())
        self.field = field
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The check of one field's value, and the commands that use the field."""

    kind: str  # the type as Ansible's argument specifications name it. A list has texts, and is a tuple in Python
    must: str  # what the value must be or have, as the end of a sentence that begins with the field's name and "must"
    is_valid: Callable[[Any], object]
    used_by: tuple[str, ...] = COMMANDS
    required_by: tuple[str, ...] = ()
    sent_empty: bool = False  # whether an order has the field also when it is empty


def _text(pattern: str, must: str, **rest: Any) -> Rule:
    # The pattern is compiled at its first use: orion-rental starts for each call.
    return Rule(
        kind="str", must=must, is_valid=lambda value: isinstance(value, str) and re.fullmatch(pattern, value), **rest
    )


def _number(low: int, high: int, **rest: Any) -> Rule:
    must = f"be a whole number from {low} and less than {high}"
    return Rule(kind="int", must=must, is_valid=lambda value: type(value) is int and low <= value < high, **rest)


def _optional(default: object, rule: Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


def _are_public_keys(value: Any) -> bool:
    if not isinstance(value, tuple) or not 0 < len(value) <= MAX_PUBLIC_KEYS:
        return False
    return all(isinstance(key, str) and re.fullmatch(_PUBLIC_KEY, key) for key in value)


def _is_start_command(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_START and value.isprintable() and bool(value.strip())


def _is_time(value: Any) -> bool:
    return type(value) in {int, float} and 0 <= value < 2**53


@dataclass(frozen=True, kw_only=True)
class RentalOrder:
    """An order for one rental. A field that equals its default is empty: the order does not set it."""

    rental_id: str = field(metadata={"rule": _text(r"[a-z0-9-]{1,64}", "be an id", sent_empty=True)})
    username: str = _optional(
        "", _text(r"r-[a-z0-9]{1,30}", "be r- and an id", used_by=_ACCOUNT, required_by=_ACCOUNT, sent_empty=True)
    )
    uid: int = _optional(0, _number(FIRST_UID, 2**31, used_by=_ACCOUNT, required_by=_ACCOUNT, sent_empty=True))
    """The uid and gid of the account."""
    epoch: int = field(metadata={"rule": _number(1, 2**53, sent_empty=True)})  # the epoch of the placement
    public_keys: tuple[str, ...] = _optional(
        (),
        Rule(
            kind="list",
            must=f"be plain public keys, 1 to {MAX_PUBLIC_KEYS}",
            is_valid=_are_public_keys,
            used_by=_KEYS,
            required_by=_KEYS,
            sent_empty=True,
        ),
    )
    """The keys by which the renter logs in."""
    start: str = _optional(
        "",
        Rule(
            kind="str",
            must=f"be one line of at most {MAX_START} printable characters",
            is_valid=_is_start_command,
            used_by=("run",),
        ),
    )
    """The start command, which runs in the renter's shell when the rental is activated."""
    start_mark: str = _optional(
        "", _text(r"[0-9]{1,16}@[A-Za-z0-9-]{0,64}", "have the form RUN@BOOT", used_by=("run",))
    )
    """The run of the start command. A worker starts no run twice."""
    rental_name: str = _optional(
        "", _text(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "be the name of a rental", used_by=_KEYS)
    )
    """The name that sessions find in ORION_RENTAL; if empty, the name of an earlier order, if one had any."""
    user_authority: str = _optional("", _text(_PUBLIC_KEY, "be a plain public key", used_by=_KEYS, sent_empty=True))
    """The public key that signs certificates for renters, if there are any."""
    host_certificate: str = _optional(
        "",
        _text(
            r"ssh-ed25519-cert-v01@openssh\.com [A-Za-z0-9+/]{20,16384}={0,3}",
            "be a certificate of an ed25519 key",
            used_by=("run", "create", "certify"),
            required_by=("certify",),
            sent_empty=True,
        ),
    )
    """The host certificate that sshd shows from now on; if empty, the present one."""
    kill: bool = _optional(
        False,
        Rule(kind="bool", must="be true or false", is_valid=lambda value: isinstance(value, bool), used_by=("lock",)),
    )
    """Whether the processes of the rental are killed too."""
    move: int = _optional(0, _number(0, 2**53, used_by=("freeze", "thaw"), sent_empty=True))
    """The number of the planned migration, which only rises for a rental."""
    boot_id: str = _optional("", _text(r"[A-Za-z0-9-]{8,64}", "be a boot id"))
    """The boot of the worker's container that the order is for; if empty, any. Former versions of workers do not know
    the field (`ordered_boot_id` of a worker)."""
    deadline: float | None = _optional(None, Rule(kind="float", must="be a Unix time", is_valid=_is_time))
    """The Unix time in seconds after which the worker refuses the order."""

    @classmethod
    def from_json(cls, data: object, command: str = "") -> RentalOrder:
        """Return the order in a JSON value, whose null fields are empty, as checked by `check`. Raise InvalidOrder."""
        if not isinstance(data, Mapping):
            raise InvalidOrder("", "an order must be a JSON object")
        declared = declared_fields(cls)
        for name in data:
            if name not in declared:
                raise InvalidOrder(str(name)[:64], "is not a field of an order")
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items() if v is not None}
        for name, each in declared.items():
            if each.default is MISSING and name not in given:
                raise InvalidOrder(name, "is missing")
        order = cls(**given)
        order.check(command)
        return order

    def check(self, command: str = "") -> None:
        """Raise InvalidOrder unless each field is valid or empty, and no field is empty that `command` requires."""
        for name, each in declared_fields(type(self)).items():
            value, rule = getattr(self, name), rule_of(each)
            is_needed = each.default is MISSING or command in rule.required_by
            if (is_needed or not _is_empty(each, value)) and not rule.is_valid(value):
                raise InvalidOrder(name, f"must {rule.must}")
        if self.start and not self.start_mark:
            raise InvalidOrder("start_mark", "is missing: a start command needs it")

    def as_json(self) -> dict[str, Any]:
        """Return the order as JSON carries it, in the sequence of its fields; empty ones only with `sent_empty`."""
        values = [(getattr(self, name), each) for name, each in declared_fields(type(self)).items()]
        given = {each.name: value for value, each in values if rule_of(each).sent_empty or not _is_empty(each, value)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def declared_fields(kind: type[RentalOrder] = RentalOrder) -> dict[str, Field[Any]]:
    """Return the fields of an order by their names, which are the same in JSON, in Ansible and in Python."""
    return {each.name: each for each in fields(kind)}


def rule_of(declared: Field[Any]) -> Rule:
    """Return the rule of a field."""
    rule: Rule = declared.metadata["rule"]
    return rule


def _is_empty(declared: Field[Any], value: object) -> bool:
    return type(value) is type(declared.default) and value == declared.default
