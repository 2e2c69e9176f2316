"""Requests"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from orion_worker.rental.host_certificate import read_certificate
from orion_worker.start.launcher import START_MARK, is_command
from orion_worker.system.processes import FIRST_UID

Report = dict[str, Any]
_RENTAL_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_PUBLIC_KEY = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/]{20,8000}={0,3}( [\x20-\x7e]{0,200})?")


@dataclass(frozen=True)
class Request:
    rental_id: str
    epoch: int
    username: str = ""
    uid: int = 0
    public_keys: tuple[str, ...] = ()
    rental_name: str = ""
    """The name that the rental's sessions are told; empty: the one that an earlier order told, if one did."""
    user_authority: str = ""
    """The key that signs certificates for renters; empty: there are none."""
    host_certificate: str = ""
    """What sshd shows from now on, in which this rental is named; empty: as before."""
    kill: bool = False
    start: str = ""
    """The start command, to run when its renter is let in; `start_mark` says which run of it: see launching.py."""
    start_mark: str = ""
    deadline: float | None = None
    """Unix time after which the order is void: who gave it has given up."""
    move: int = 0
    """For freeze and thaw: the planned move that it is for, by a number that only rises for a rental."""
    boot_id: str = ""
    """The life of this container that the order is for; empty: any."""


def parse_request(command: str, text: str) -> Request:
    """The request of a command. Raises ValueError, in words for a person."""
    return request_from(command, json.loads(text))


def request_from(command: str, data: object) -> Request:
    if not isinstance(data, dict):
        raise ValueError("the request must be a JSON object")
    unknown = set(data) - set(Request.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    data = {name: value for name, value in data.items() if value is not None}
    request = Request(**{**data, "public_keys": tuple(data.get("public_keys", ()))})
    _check(re.fullmatch(r"[a-z0-9-]{1,64}", request.rental_id), "rental_id is not an id")
    _check(type(request.epoch) is int and request.epoch >= 1, "epoch must be a whole number from 1")
    _check(type(request.move) is int and request.move >= 0, "move must be a whole number from 0")
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
