"""The order that the manager gives a worker for one rental. Each of its fields is declared here and nowhere else.

The manager, the Ansible action, the documentation of its task and the worker's `orion-rental` share this class, so the
module has the standard library alone, imports nothing slow, and is copied into the worker's image. The engine and the
worker each check every order by it, whatever sent it.

A worker refuses a field that it does not know, so an order leaves out what it does not need. The exceptions are the
fields with `sent_empty`, which every released worker knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

COMMANDS = ("run", "create", "certify", "lock", "unlock", "freeze", "thaw", "purge")
"""The commands of `orion-rental` that take an order."""
FIRST_UID = 100_000
MAX_START = 1000
"""Characters of a start command, at most."""
MAX_PUBLIC_KEYS = 64

_ACCOUNT = ("run", "create", "purge")
_KEYS = ("run", "create")
_PUBLIC_KEY = r"[a-z0-9@.-]+ [A-Za-z0-9+/]{20,8000}={0,3}( [\x20-\x7e]{0,200})?"


class InvalidOrder(ValueError):
    """A field of an order is wrong or unknown. The message names the field and never quotes its value."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}".lstrip())
        self.field = field
        self.problem = problem


@dataclass(frozen=True)
class Rule:
    """How the value of one field is checked, and which commands use it."""

    kind: str
    """The type as Ansible's argument specifications name it. A list has texts, and is a tuple in Python."""
    must: str
    """What the value must be or have, as the end of a sentence that begins with the field's name and "must"."""
    is_valid: Callable[[Any], object]
    used_by: tuple[str, ...] = COMMANDS
    required_by: tuple[str, ...] = ()
    sent_empty: bool = False
    """Whether an order has the field also when it is empty."""


def _text(pattern: str, must: str, **rest: Any) -> dict[str, Rule]:
    # The pattern is compiled at its first use: orion-rental starts for each call.
    return _rule("str", must, lambda value: isinstance(value, str) and re.fullmatch(pattern, value), **rest)


def _number(low: int, high: int, **rest: Any) -> dict[str, Rule]:
    must = f"be a whole number from {low} and less than {high}"
    return _rule("int", must, lambda value: type(value) is int and low <= value < high, **rest)


def _rule(kind: str, must: str, is_valid: Callable[[Any], object], **rest: Any) -> dict[str, Rule]:
    return {"rule": Rule(kind, must, is_valid, **rest)}


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
    """One order for one rental. A field with its default is empty: the order does not say anything of it."""

    rental_id: str = field(metadata=_text(r"[a-z0-9-]{1,64}", "be an id", sent_empty=True))
    username: str = field(
        default="",
        metadata=_text(r"r-[a-z0-9]{1,30}", "be r- and an id", used_by=_ACCOUNT, required_by=_ACCOUNT, sent_empty=True),
    )
    """The name of the account."""
    uid: int = field(
        default=0, metadata=_number(FIRST_UID, 2**31, used_by=_ACCOUNT, required_by=_ACCOUNT, sent_empty=True)
    )
    """The uid and gid of the account."""
    epoch: int = field(metadata=_number(1, 2**53, sent_empty=True))
    """The epoch of the placement."""
    public_keys: tuple[str, ...] = field(
        default=(),
        metadata=_rule(
            "list",
            f"be plain public keys, 1 to {MAX_PUBLIC_KEYS}",
            _are_public_keys,
            used_by=_KEYS,
            required_by=_KEYS,
            sent_empty=True,
        ),
    )
    """The keys by which the renter logs in."""
    start: str = field(
        default="",
        metadata=_rule(
            "str", f"be one line of at most {MAX_START} printable characters", _is_start_command, used_by=("run",)
        ),
    )
    """The start command, which runs in the renter's shell when the rental is activated."""
    start_mark: str = field(
        default="", metadata=_text(r"[0-9]{1,16}@[A-Za-z0-9-]{0,64}", "have the form RUN@BOOT", used_by=("run",))
    )
    """The run of the start command. A worker starts no run twice."""
    rental_name: str = field(
        default="", metadata=_text(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "be the name of a rental", used_by=_KEYS)
    )
    """The name that sessions find in ORION_RENTAL; empty: the name of an earlier order, if one had any."""
    user_authority: str = field(
        default="", metadata=_text(_PUBLIC_KEY, "be a plain public key", used_by=_KEYS, sent_empty=True)
    )
    """The public key that signs certificates for renters; empty: there are none."""
    host_certificate: str = field(
        default="",
        metadata=_text(
            r"ssh-ed25519-cert-v01@openssh\.com [A-Za-z0-9+/]{20,16384}={0,3}",
            "be a certificate of an ed25519 key",
            used_by=("run", "create", "certify"),
            required_by=("certify",),
            sent_empty=True,
        ),
    )
    """The host certificate that sshd shows from now on; empty: as before."""
    kill: bool = field(
        default=False,
        metadata=_rule("bool", "be true or false", lambda value: isinstance(value, bool), used_by=("lock",)),
    )
    """Whether the processes of the rental are killed too."""
    move: int = field(default=0, metadata=_number(0, 2**53, used_by=("freeze", "thaw"), sent_empty=True))
    """The number of the planned migration, which only rises for a rental."""
    boot_id: str = field(default="", metadata=_text(r"[A-Za-z0-9-]{8,64}", "be a boot id"))
    """The boot of the worker's container that the order is for; empty: any. Workers of former versions do not know
    the field (`ordered_boot_id` of a worker)."""
    deadline: float | None = field(default=None, metadata=_rule("float", "be a Unix time", _is_time))
    """The Unix time in seconds after which the worker refuses the order."""

    @classmethod
    def from_json(cls, data: object, command: str = "") -> RentalOrder:
        """Return the order in a JSON value, checked. Raise InvalidOrder, a ValueError, if it holds none.

        A field that is null is empty. `command`: see `check`.
        """
        if not isinstance(data, Mapping):
            raise InvalidOrder("", "an order must be a JSON object")
        declared = declared_fields(cls)
        for name in data:
            if name not in declared:
                raise InvalidOrder(str(name)[:64], "is not a field of an order")
        given = {name: value for name, value in data.items() if value is not None}
        for name, each in declared.items():
            if each.default is MISSING and name not in given:
                raise InvalidOrder(name, "is missing")
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        order = cls(**values)
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
        """Return the order as JSON carries it, without the fields that are empty, in the sequence of the fields."""
        values = {
            name: getattr(self, name)
            for name, each in declared_fields(type(self)).items()
            if rule_of(each).sent_empty or not _is_empty(each, getattr(self, name))
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def declared_fields(kind: type[RentalOrder] = RentalOrder) -> dict[str, Field[Any]]:
    """Return the fields of an order by their names, which are the same in JSON, in Ansible and in Python."""
    return {each.name: each for each in fields(kind)}


def rule_of(declared: Field[Any]) -> Rule:
    """Return the rule of a field."""
    rule: Rule = declared.metadata["rule"]
    return rule


def _is_empty(declared: Field[Any], value: object) -> bool:
    return type(value) is type(declared.default) and value == declared.default
