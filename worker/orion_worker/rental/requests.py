"""What the manager or the agent asks of orion-rental for one rental, and how such a request is checked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from orion_worker.rental.host_certificate import read_certificate
from orion_worker.start.launcher import START_MARK, is_command
from orion_worker.system.processes import FIRST_UID

Report = dict[str, Any]
"""What a command answers, as JSON carries it."""
_RENTAL_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_PUBLIC_KEY = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/]{20,8000}={0,3}( [\x20-\x7e]{0,200})?")


@dataclass(frozen=True)
class RentalRequest:
    """One command for one rental."""

    rental_id: str
    epoch: int
    username: str = ""
    uid: int = 0
    public_keys: tuple[str, ...] = ()
    rental_name: str = ""
    """The name that sessions find in ORION_RENTAL; empty: the name of an earlier order, if one had any."""
    user_authority: str = ""
    """The public key that signs certificates for renters; empty: there are none."""
    host_certificate: str = ""
    """The certificate that sshd shows from now on, in which this rental is named; empty: as before."""
    kill: bool = False
    start: str = ""
    """The start command, which runs when the rental is activated."""
    start_mark: str = ""
    """Which run of the start command this is (start/launcher.py)."""
    deadline: float | None = None
    """The Unix time after which the order is void, because its sender has given up."""
    migration: int = 0
    """For freeze and thaw: the number of the planned migration, which only rises for a rental."""
    boot_id: str = ""
    """The life of this container that the order is for; empty: any."""


RELEASED_NAMES = {"migration": "move"}
"""The names of fields in the JSON where they differ from ours: managers of released versions send them."""


def parse_request(command: str, text: str) -> RentalRequest:
    """Return the request of a command; raise ValueError, in words for a person, if it is none."""
    return request_from(command, json.loads(text))


def request_from(command: str, data: object) -> RentalRequest:
    """Return the request that a JSON value holds; raise ValueError or TypeError if it is none for this command."""
    if not isinstance(data, dict):
        raise ValueError("the request must be a JSON object")
    ours = {RELEASED_NAMES.get(name, name): name for name in RentalRequest.__dataclass_fields__}
    unknown = data.keys() - ours.keys()
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    data = {ours[released]: value for released, value in data.items() if value is not None}
    request = RentalRequest(**{**data, "public_keys": tuple(data.get("public_keys", ()))})
    _check(re.fullmatch(r"[a-z0-9-]{1,64}", request.rental_id), "rental_id is not an id")
    _check(type(request.epoch) is int and request.epoch >= 1, "epoch must be a whole number from 1")
    _check(type(request.migration) is int and request.migration >= 0, "move must be a whole number from 0")
    _check(isinstance(request.boot_id, str), "boot_id must be a text")
    if command in ("run", "create", "purge"):
        _check(re.fullmatch(r"r-[a-z0-9]{1,30}", request.username), "username must be r- and an id")
        _check(type(request.uid) is int and FIRST_UID <= request.uid < 2**31, f"uid must be from {FIRST_UID}")
    if command in ("run", "create"):
        _check(request.public_keys, "public_keys is empty")
        _check(all(map(_PUBLIC_KEY.fullmatch, request.public_keys)), "public_keys must be plain public keys")
        _check(not request.rental_name or _RENTAL_NAME.fullmatch(request.rental_name), "rental_name is no name")
        _check(not request.start or is_command(request.start), "start must be one line of printable characters")
        _check(not request.start or START_MARK.fullmatch(request.start_mark), "start_mark must be RUN@BOOT")
    if command == "certify":
        _check(request.host_certificate, "host_certificate is empty")
    if request.host_certificate:
        read_certificate(request.host_certificate)
    if request.user_authority:
        _check(_PUBLIC_KEY.fullmatch(request.user_authority), "user_authority must be a plain public key")
    return request


def _check(truth: object, message: str) -> None:
    if not truth:
        raise ValueError(message)
