"""The requests and replies of the API, for the manager, the client and the tests.

Times are RFC 3339 in UTC. Durations are seconds, and their names end in `_s`. The manager refuses requests with unknown
fields. The descriptions and the docstrings of the models are also the text of the OpenAPI document.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

DEFAULT_TTL_S = 24 * 3600
MIN_TTL_S = 60
MAX_TTL_S = 30 * 24 * 3600
MAX_TOKEN_TTL_S = 10 * 365 * 24 * 3600
DEFAULT_WAIT_S = 30
MAX_WAIT_S = 55
MAX_PAGE = 500
MAX_START = 1000  # characters of a start command, at most
MAX_SLOTS = 256  # slots of one worker, at most: its host certificate names its rentals, and OpenSSH reads 256 names
MAX_KEYS = 32  # keys of one rental, at most
MAX_COMMENT = 100  # characters of a key's comment that are kept
MIN_PORT, MAX_PORT = 1024, 65535  # the ports on which a rental's processes may listen
MAX_PUBLIC_PORTS = 32  # public ports of one rental, at most
MAX_CERTIFICATE_S = 3600  # seconds for which a certificate of a renter's key is valid, at most

SSH_KEY_TYPES = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)
MIN_RSA_BITS = 2048
KEY_FIELDS = range(2, 5)  # fields of a public key: its type, and 1 (ed25519) to 3 (ECDSA on a security key) more
_SSH_KEY = re.compile(
    r"(?P<type>[a-z0-9@.\-]+) (?P<key>[A-Za-z0-9+/]{20,4096}={0,3})(?: (?P<comment>[\x21-\x7e][\x20-\x7e]{0,127}))?"
)

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


class WorkerHealth(StrEnum):
    """The health of a worker: whether it can run rentals, as far as the manager knows."""

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    UNKNOWN = "unknown"
    DOWN = "down"
    QUARANTINED = "quarantined"


class WorkerIntent(StrEnum):
    """The use of a worker that the operators want."""

    ACTIVE = "active"
    DRAINING = "draining"
    DRAINED = "drained"


class RentalState(StrEnum):
    """The state of a rental, from `queued` to `released`, `expired` or `failed`."""

    QUEUED = "queued"
    PROVISIONING = "provisioning"
    ACTIVE = "active"
    MIGRATING = "migrating"
    RELEASING = "releasing"
    RELEASED = "released"
    EXPIRED = "expired"
    FAILED = "failed"


class Role(StrEnum):
    """The role of a token, which decides what it allows."""

    ADMIN = "admin"
    CLIENT = "client"
    JOIN = "join"
    WORKER = "worker"


NOT_MOVED = "could not be moved: "  # the beginning of a rental's explanation after a migration that failed


class Want(StrEnum):
    """The state that the manager wants for a rental that a worker holds."""

    RUN = "run"
    HOLD = "hold"
    PURGE = "purge"


# Keys, names and commands


def one_public_key(text: str) -> str:
    """Return the text of one OpenSSH public key without its comment. Raise ValueError for anything else.

    root writes the key into an authorized_keys file, where an option (`command=`) or a second line would give control.
    """
    match = _SSH_KEY.fullmatch(text.strip())
    if not match or match["type"] not in SSH_KEY_TYPES:
        raise ValueError("must be one OpenSSH public key, such as 'ssh-ed25519 AAAA... comment', without options")
    fields = _ssh_fields(match["key"])
    if not fields or fields[0] != match["type"].encode():
        raise ValueError(f"is damaged: its data is not a complete {match['type']} key")
    if match["type"] == "ssh-rsa" and int.from_bytes(fields[-1], "big").bit_length() < MIN_RSA_BITS:
        raise ValueError(f"is too weak: an RSA key needs at least {MIN_RSA_BITS} bits; an ed25519 key is better")
    return f"{match['type']} {match['key']}"


def comment_of(text: str) -> str:
    """Return the comment of a public key in printable ASCII, cut to MAX_COMMENT characters."""
    match = _SSH_KEY.fullmatch(text.strip())
    return (match["comment"] or "")[:MAX_COMMENT].rstrip() if match else ""


def named_key(text: str) -> str:
    """Return the text of one OpenSSH public key with its comment. Raise ValueError as `one_public_key` does."""
    return f"{one_public_key(text)} {comment_of(text)}".rstrip()


def key_id(public_key: str) -> str:
    """Return the short id of a public key, which fits into a URL."""
    return hashlib.sha256(base64.b64decode(public_key.split()[1])).hexdigest()[:16]


def fingerprint(public_key: str) -> str:
    """Return the fingerprint of a public key as `ssh-keygen -l` shows it."""
    digest = hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _ssh_fields(encoded: str) -> list[bytes]:
    """Return the fields of an SSH key's data, each after its length in four bytes (RFC 4253, 6.6); [] if damaged."""
    try:
        rest = base64.b64decode(encoded, validate=True)
    except ValueError:
        return []
    fields = []
    while rest:
        length = int.from_bytes(rest[:4], "big")
        fields.append(rest[4 : 4 + length])
        if len(fields[-1]) < length or len(rest) < 4:
            return []
        rest = rest[4 + length :]
    return fields if len(fields) in KEY_FIELDS else []


def plain_name(text: str) -> str:
    """Return the name. Raise ValueError if it could do harm in a shell, in a URL or as a host name."""
    if not _NAME.fullmatch(text):
        form = "must be lowercase letters, digits and hyphens, at most 40, such as my-lab"
        raise ValueError(f"{form}; it begins with a letter and does not end with a hyphen")
    return text


def start_command(text: str) -> str:
    """Return the command. Raise ValueError if it is not one line that a shell can run."""
    if not text.strip():
        raise ValueError("must be a command; without a command leave the field out")
    if len(text) > MAX_START or not text.isprintable():
        advice = "put a longer script into a file in the rental's home"
        raise ValueError(f"must be one line of at most {MAX_START} printable characters; {advice}")
    return text


PublicKey = Annotated[str, Field(max_length=8192), AfterValidator(one_public_key)]
NamedKey = Annotated[str, Field(max_length=8192), AfterValidator(named_key)]  # with its comment, which people read
Name = Annotated[str, AfterValidator(plain_name), Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"})]
LabelKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]{0,63}$")]
StartCommand = Annotated[str, AfterValidator(start_command), Field(json_schema_extra={"maxLength": MAX_START})]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
Ttl = Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S, strict=True)]


# Messages for wrong values

_IN_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a field of this request",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "string_too_long": "must be at most {max_length} characters",
    "string_too_short": "must be at least {min_length} characters",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "string_pattern_mismatch": "must have the form {pattern}",
    **dict.fromkeys(["int_type", "int_parsing", "int_from_float"], "must be a whole number"),
    **dict.fromkeys(["float_type", "float_parsing"], "must be a number"),
    **dict.fromkeys(["bool_type", "bool_parsing"], "must be true or false"),
    "string_type": "must be text",
    "list_type": "must be a list",
    **dict.fromkeys(["dict_type", "model_attributes_type"], "must be an object"),
    **dict.fromkeys(["enum", "literal_error"], "must be {expected}"),
    "json_invalid": "is not JSON: {error}",
}
"""The message for each type of a validation error, to be put after the name of the field."""
_LABELS = (
    "must be letters, digits and . _ / - on both sides of =, at most 63 on each, such as team=blue; "
    "a key begins with a letter or digit"
)


def in_words(error: Mapping[str, Any]) -> str:
    """Return the message for one of a ValidationError's `errors()`, to be put after the name of the field."""
    if error["type"] == "string_pattern_mismatch" and "labels" in error["loc"]:
        return _LABELS
    if words := _IN_WORDS.get(error["type"]):
        return words.format(**error.get("ctx", {}))
    return str(error["msg"].removeprefix("Value error, "))


class Request(BaseModel):
    """The base of all requests. The manager refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Reply(BaseModel):
    """The base of all replies. Clients ignore unknown fields, so that an older client can read a newer reply."""

    model_config = ConfigDict(extra="ignore", frozen=True)


# Calls of a worker


class Load(Request):
    """The resources that a worker uses."""

    cpu: float = Field(0.0, ge=0, le=4096, strict=True, description="Mean processors in use since the last heartbeat")
    memory_used_bytes: int = Field(0, ge=0, lt=2**53, strict=True)
    memory_limit_bytes: int = Field(0, ge=0, lt=2**53, strict=True, description="0: no limit")
    processes: int = Field(0, ge=0, lt=2**31, strict=True)


class InventoryItem(Request):
    """A rental as its worker reports it."""

    rental_id: Id
    username: Annotated[str, StringConstraints(pattern=r"^r-[a-z0-9]{1,30}$")]
    uid: int = Field(ge=100_000, lt=2**31, strict=True)
    epoch: int = Field(ge=1, lt=2**53, strict=True)
    state: Literal["locked", "running", "frozen"]


Inventory = Annotated[list[InventoryItem], Field(max_length=10_000)]


class PlacementOrder(Reply):
    """The order for one rental of a worker: whether the worker must run, hold or purge it."""

    rental_id: str
    epoch: int
    want: Want


class RegisterRequest(Request):
    """The call with which a worker joins the pool."""

    hostname: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$")]
    ssh_host_keys: Annotated[list[PublicKey], Field(min_length=1, max_length=8)]
    slots: int = Field(1, ge=1, le=MAX_SLOTS)
    labels: Labels = {}
    boot_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{8,64}$")]
    agent_version: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.+-]{1,64}$")]
    inventory: Inventory = []


class RegisterReply(Reply):
    """The identity and the settings of a registered worker."""

    worker_id: str
    worker_token: str
    session_id: str
    heartbeat_interval_s: float
    lease_s: float
    door_answer_s: float = Field(description="Seconds for which the proxy's answer that it has no manager counts")
    authorized_keys: list[str] = Field(description="The manager's lines for root's authorized_keys file")
    placements: list[PlacementOrder]


class StartEnd(Request):
    """The end of one run of a start command; `unseen` if the program that records the output ended as well."""

    rental_id: Id
    epoch: int = Field(ge=1, lt=2**53, strict=True)
    run: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,16}@[A-Za-z0-9-]{0,64}$")]
    how: Annotated[str, StringConstraints(pattern=r"^(status [0-9]{1,3}|signal [0-9]{1,2}|unseen)$")]
    ago_s: float = Field(0, ge=0, le=1e9, strict=True, description="Seconds since the run ended")


FURTHER_FIELDS = ("start_ends",)  # fields of a heartbeat for managers that name them in `takes`: older ones refuse them


class HeartbeatRequest(Request):
    """A worker's report, sent at regular intervals. Numbers must be JSON numbers, not text."""

    # api/heartbeat.py reads most heartbeats with a faster parser, which is as strict as this model.
    session_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{8,64}$")]
    seq: int = Field(ge=0, lt=2**53, strict=True)
    load: Load = Load()
    inventory: Inventory = []
    lease_s: float = Field(
        0, ge=0, le=86_400, strict=True, description="The lease of the last reply in seconds; 0 before the first reply"
    )
    start_ends: Annotated[list[StartEnd], Field(max_length=MAX_SLOTS)] = []
    vacating: bool = Field(False, strict=True, description="Whether the worker stops once all its rentals have left")
    leaving: bool = Field(
        False,
        strict=True,
        description="Whether this is the last heartbeat: the worker has stopped its rentals and ends",
    )


class HeartbeatReply(Reply):
    """The answer to a heartbeat: a new lease, and what the worker must do."""

    lease_s: float
    door_answer_s: float
    next_heartbeat_s: float
    placements: list[PlacementOrder]
    takes: list[str] = Field([], description="Optional fields that the next heartbeat may contain, such as start_ends")


# Rentals


class RentRequest(Request):
    """The environment to rent. Without a name or a key the platform makes one."""

    name: Name | None = None
    ssh_public_key: NamedKey | None = None
    ttl_s: Ttl = DEFAULT_TTL_S
    labels: Labels = {}
    start: StartCommand | None = Field(
        None, description="A command for the shell, run in the home at each activation on a worker"
    )
    wait_s: float = Field(DEFAULT_WAIT_S, ge=0, le=MAX_WAIT_S)


class SshAuthority(Reply):
    """The authority by which a renter's ssh verifies a worker. The worker's host certificate names its rentals."""

    public_key: str
    known_hosts: str = Field(description="The line for a known_hosts file; set HostKeyAlias to ID.orion")


class Key(Reply):
    """An SSH key that opens a rental."""

    id: str
    fingerprint: str = Field(description="The fingerprint as ssh-keygen -l shows it")
    public_key: str
    comment: str = Field("", description="The comment that was given with the key; the platform does not interpret it")
    in_place: bool = Field(description="Whether the worker has all keys of this list; if not, it gets them soon")


class AddKeyRequest(Request):
    """A key to add to a rental."""

    ssh_public_key: NamedKey
    wait_s: float = Field(DEFAULT_WAIT_S, ge=0, le=MAX_WAIT_S)


class CertificateRequest(Request):
    """The key to certify. It need not be one of the rental's keys."""

    ssh_public_key: PublicKey
    ttl_s: int = Field(MAX_CERTIFICATE_S, ge=MIN_TTL_S, le=MAX_CERTIFICATE_S, strict=True)


class CertificateReply(Reply):
    """A certificate that opens a rental."""

    certificate: str = Field(
        description="The line for a file KEY-cert.pub; it opens the rental until the rental changes its worker"
    )
    expires_at: datetime


class TerminalTicket(Reply):
    """A ticket for one terminal in a browser: the second subprotocol of the WebSocket, after `orion.terminal`."""

    ticket: str
    expires_in_s: float


class WebPort(Reply):
    """A port on which the rental's processes may listen, and its addresses on the platform."""

    port: int
    public: bool = Field(description="Whether anybody may open the port; if not, the rental's owner and admins may")
    path: str = Field(pattern=r"^/[A-Za-z0-9/-]+$", description="The port's path on the platform's own address")
    host: str | None = Field(None, pattern=r"^[a-z0-9.-]+$", description="The port's own host name; null: it has none")


class ExposeRequest(Request):
    """The access to a port: whether anybody may open it."""

    public: bool = Field(strict=True)


class WebPortTicket(WebPort):
    """A port with a ticket for one browser, which opens it at /.orion/open/#RENTAL/PORT/TICKET on either host."""

    ticket: str
    expires_in_s: float


class RenewRequest(Request):
    """The new time of a rental, counted from now."""

    ttl_s: Ttl = DEFAULT_TTL_S


class Snapshot(Reply):
    """A complete copy of a rental's home, kept by the platform."""

    generation: str = Field(description="The snapshot's id, EPOCH-NUMBER; a later snapshot has a higher one")
    at: datetime = Field(description="The last time at which the home was found to be as in this snapshot")
    bytes: int
    files: int = Field(description="Number of files, directories and links")
    skipped: list[str] = Field(description="The first names of files that are missing or lack attributes or mode")
    salvage: bool = Field(False, description="Whether this is a recovered snapshot: the files of a lost worker")


class Rental(Reply):
    """A rented environment."""

    id: str
    name: str
    owner: str
    state: RentalState
    epoch: int = Field(description="The number of the present placement; 0 before the first")
    worker_id: str | None
    moving_to: str | None = Field(None, description="The worker to which the rental is being migrated")
    username: str
    ssh_host_keys: list[str] = Field(description="The host keys of the rental's worker; empty if it has no worker")
    labels: dict[str, str]
    ttl_s: int
    created_at: datetime
    expires_at: datetime | None = Field(
        description="Null before the rental is first active, and while the manager does not trust its clock"
    )
    last_safe_copy_at: datetime | None = Field(description="When the last complete snapshot of the home was begun")
    last_safe_copy_bytes: int | None = Field(None, description="Bytes of the files and directories of that snapshot")
    copy_problem: str = Field("", description="Why no snapshot of the home can be made at present")
    home_warning: str = Field(
        "", description="The home's size, if above 80 % of its limit; how often snapshots are made, if less than usual"
    )
    salvage: Snapshot | None = Field(
        None, description="The newest recovered snapshot with files that the rental lacks; shown for a week"
    )
    start: str | None = Field(None, description="The start command")
    start_problem: str = Field("", description="Why the start command is not run any more")
    start_end: str = Field(
        "", description="How the start command ended: status N, signal N or unseen; empty while it runs or will run"
    )
    start_ended_at: datetime | None = Field(None, description="When the start command ended, as its worker reports it")
    public_ports: list[int] = Field([], description="The web ports that anybody may open")
    explanation: str = Field(description="The reason for the state, for people")


class RentReply(Rental):
    """A new rental."""

    ssh_private_key: str | None = Field(
        None, description="The private key that the platform made, in this reply only; null if a key was given"
    )


class RestoreRequest(Request):
    """The files to restore: give exactly one of `generation` and `empty`."""

    generation: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,15}-[1-9][0-9]{0,15}$")] | None = None
    empty: bool = Field(False, description="Start with an empty home")
    discard: bool = Field(False, description="Do not make a snapshot of the present files first")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.generation is not None) == self.empty:
            raise ValueError("give either generation or empty")
        return self


# Workers, tokens, events and the platform


class Worker(Reply):
    """A worker of the pool."""

    id: str
    hostname: str
    address: str
    health: WorkerHealth
    intent: WorkerIntent
    slots: int
    slots_free: int
    labels: dict[str, str]
    load: Load
    last_heartbeat_at: datetime | None
    ssh_host_keys: list[str]
    explanation: str


class DrainRequest(Request):
    """Workers to drain at once."""

    worker_ids: list[Id] = Field(
        min_length=1, max_length=1000, description="No rental of one of these workers is migrated to another of them"
    )


class Kept(Reply):
    """A worker that is down and was not forgotten."""

    id: str
    why: str = Field(description="Why the worker was not forgotten")


class Pruned(Reply):
    """The workers that were forgotten, and those that were kept though they are down."""

    forgotten: list[str]
    kept: list[Kept]


class TokenRequest(Request):
    """The token to make."""

    name: Name
    role: Literal["client", "admin", "join"] = "client"
    ttl_s: int | None = Field(None, ge=MIN_TTL_S, le=MAX_TOKEN_TTL_S, strict=True)


class Token(Reply):
    """A token without its secret."""

    id: str
    name: str
    role: Role
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class TokenReply(Token):
    """A new token with its secret."""

    token: str = Field(description="The secret, in this reply only; the platform keeps its hash alone")


class Event(Reply):
    """Something that happened on the platform."""

    id: int
    at: datetime
    kind: str = Field(description="What happened, such as 'rental.activated'")
    actor: str
    reason: str
    owner: str | None
    rental_id: str | None
    worker_id: str | None
    epoch: int | None
    details: dict[str, Any] = {}


class LogEntry(Reply):
    """One finished job of the provisioning engine."""

    at: datetime
    action: str = Field(description="The playbook: create_user or delete_user")
    worker_id: str
    epoch: int
    ok: bool
    seconds: float = Field(description="Seconds from the order to the outcome")
    message: str


class Overdue(Reply):
    """Something that has been in one state for too long."""

    kind: Literal["worker", "rental", "placement"]
    id: str
    name: str = Field(description="The hostname of the worker, or the name of the rental")
    state: str
    since_s: float = Field(description="Seconds in this state, at most those since the start of the manager")
    why: str
    what_to_do: str


class RentalName(Reply):
    """The names of a rental and its owner."""

    id: str
    name: str
    owner: str


class RestorePlan(Reply):
    """The effect that restoring a backup would have. A second request with its `id` starts the restore."""

    id: str
    last_event_at: datetime | None = Field(description="The time of the backup's last event")
    rentals: int = Field(description="Number of living rentals in the backup")
    forgotten: list[RentalName] = Field(description="Rentals that live now and are not in the backup")
    revived: list[RentalName] = Field(description="Rentals that live in the backup and have ended since")


class Restoring(Reply):
    """The answer to an accepted restore."""

    kept_as: str = Field(description="The file name of the former database, which is kept beside the new one")


class Status(Reply):
    """The state of the whole platform."""

    version: str
    brake: str | None = Field(description="Why silent workers are not declared down at present; null if they are")
    workers: dict[str, int] = Field(description="Number of workers by health")
    rentals: dict[str, int] = Field(description="Number of living rentals by state")
    slots: int
    slots_free: int
    copies_paused: str | None = Field(None, description="Why no snapshots are made at present; null if they are")
    clock: str | None = Field(None, description="Why the manager does not trust its clock (no rental expires), or null")
    overdue: list[Overdue] = Field([], description="Everything that has waited too long, why, and what to do")


class ManagerClock(Reply):
    """The manager's clock: whether the manager trusts it."""

    problem: str | None = Field(description="Why the manager does not trust its clock; null if it does")


T = TypeVar("T")


class Page(Reply, Generic[T]):
    """One page of a list."""

    items: list[T]
    next: str | None = Field(None, description="The value of `after` for the next page; null on the last page")


class Problem(Reply):
    """An error (RFC 9457, application/problem+json). `code` is stable and for programs; `detail` says what to do."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str = ""
    errors: list[dict[str, Any]] = []
