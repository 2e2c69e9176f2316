"""The contract: every request and reply of the API, shared by the manager, the client and the tests.

Times are RFC 3339 in UTC; durations are seconds and end in `_s`. Unknown fields of a request are refused.
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
MAX_START = 1000
MAX_SLOTS = 256
"""Of one worker, whose certificate names all its rentals: OpenSSH reads no more names."""
MAX_KEYS = 32
MAX_COMMENT = 100
"""Characters of a key's comment that are kept."""
MIN_PORT, MAX_PORT = 1024, 65535
"""Of what a rental's processes may listen on."""
MAX_PUBLIC_PORTS = 32
"""Of a rental."""
MAX_CERTIFICATE_S = 3600

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
KEY_FIELDS = range(2, 5)
"""Its type, and what the algorithm needs: one (ed25519) to three (a security key of ECDSA)."""
_SSH_KEY = re.compile(
    r"(?P<type>[a-z0-9@.\-]+) (?P<key>[A-Za-z0-9+/]{20,4096}={0,3})(?: (?P<comment>[\x21-\x7e][\x20-\x7e]{0,127}))?"
)

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


class WorkerHealth(StrEnum):
    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    UNKNOWN = "unknown"
    DOWN = "down"
    QUARANTINED = "quarantined"


class WorkerIntent(StrEnum):
    ACTIVE = "active"
    DRAINING = "draining"
    DRAINED = "drained"


class RentalState(StrEnum):
    QUEUED = "queued"
    PROVISIONING = "provisioning"
    ACTIVE = "active"
    MIGRATING = "migrating"
    RELEASING = "releasing"
    RELEASED = "released"
    EXPIRED = "expired"
    FAILED = "failed"


class Role(StrEnum):
    ADMIN = "admin"
    CLIENT = "client"
    JOIN = "join"
    WORKER = "worker"


NOT_MOVED = "could not be moved: "
"""How the explanation of a rental begins that was to go to another worker, and goes on where it is."""


class Want(StrEnum):
    """What the manager wants of a rental that a worker holds."""

    RUN = "run"
    HOLD = "hold"
    PURGE = "purge"


def one_public_key(text: str) -> str:
    """One OpenSSH public key without options, its comment dropped.

    Raises ValueError for anything else: an option (`command=`) or a second line in an authorized_keys file
    would be the renter's word in a file of root.
    """
    match = _SSH_KEY.fullmatch(text.strip())
    if not match or match["type"] not in SSH_KEY_TYPES:
        raise ValueError("must be one OpenSSH public key, such as 'ssh-ed25519 AAAA... comment', without options")
    fields = _ssh_fields(match["key"])
    if not fields or fields[0] != match["type"].encode():
        raise ValueError(f"is damaged: its data is not that of a whole {match['type']} key")
    if match["type"] == "ssh-rsa" and int.from_bytes(fields[-1], "big").bit_length() < MIN_RSA_BITS:
        raise ValueError(f"is too weak: an RSA key needs {MIN_RSA_BITS} bits; ed25519 is better")
    return f"{match['type']} {match['key']}"


def comment_of(text: str) -> str:
    """Return what a public key is called, in printable ASCII: at most MAX_COMMENT characters of its comment."""
    match = _SSH_KEY.fullmatch(text.strip())
    return (match["comment"] or "")[:MAX_COMMENT].rstrip() if match else ""


def named_key(text: str) -> str:
    """One public key as `one_public_key` has it, with its comment. Raises ValueError as that does."""
    return f"{one_public_key(text)} {comment_of(text)}".rstrip()


def key_id(public_key: str) -> str:
    """Of one public key, for an address: short, and nothing in it that an address would not have."""
    return hashlib.sha256(base64.b64decode(public_key.split()[1])).hexdigest()[:16]


def fingerprint(public_key: str) -> str:
    """As `ssh-keygen -l` shows it."""
    digest = hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _ssh_fields(encoded: str) -> list[bytes]:
    """The strings of an SSH key's data, each after its length in four bytes (RFC 4253, 6.6); none if it is damaged."""
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
    """Harmless in a shell, in a URL and as a host's name. Raises ValueError for anything else."""
    if not _NAME.fullmatch(text):
        raise ValueError("must be lowercase letters, digits and hyphens, from a letter on, at most 40: such as my-lab")
    return text


def start_command(text: str) -> str:
    """One line for a shell, which alone makes something of it. Raises ValueError for anything else."""
    if not text.strip():
        raise ValueError("must be a command, or be left out")
    if len(text) > MAX_START or not text.isprintable():
        raise ValueError(
            f"must be one line of printable characters, at most {MAX_START}: put more into a file in the rental's home"
        )
    return text


PublicKey = Annotated[str, Field(max_length=8192), AfterValidator(one_public_key)]
NamedKey = Annotated[str, Field(max_length=8192), AfterValidator(named_key)]
"""A public key with its comment, which is for people: a file of keys gets what `one_public_key` leaves of it."""
Name = Annotated[str, AfterValidator(plain_name), Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"})]
LabelKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]{0,63}$")]
StartCommand = Annotated[str, AfterValidator(start_command), Field(json_schema_extra={"maxLength": MAX_START})]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
Ttl = Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S, strict=True)]


_IN_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is no field of this request",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "string_too_long": "must be at most {max_length} characters",
    "string_too_short": "must be at least {min_length} characters",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "string_pattern_mismatch": "must have the form {pattern}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_attributes_type": "must be an object",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
    "json_invalid": "is not JSON: {error}",
}
"""What each type of a validation error means in words, to follow the name of the field."""
_LABELS = (
    "must be letters, digits and . _ / - on both sides, such as team=blue: at most 63 on each, "
    "the key from a letter or digit on"
)


def in_words(error: Mapping[str, Any]) -> str:
    """Return what is wrong with a field, to follow its name. `error` is one of a ValidationError's `errors()`."""
    if error["type"] == "string_pattern_mismatch" and "labels" in error["loc"]:
        return _LABELS
    words = _IN_WORDS.get(error["type"])
    return (
        words.format(**error["ctx"]) if words and "{" in words else words or error["msg"].removeprefix("Value error, ")
    )


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reply(BaseModel):
    """Clients of an older version must be able to read a newer reply: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Load(Request):
    cpu: float = Field(
        0.0, ge=0, le=4096, strict=True, description="Processors in use, averaged since the last heartbeat"
    )
    memory_used_bytes: int = Field(0, ge=0, lt=2**53, strict=True)
    memory_limit_bytes: int = Field(0, ge=0, lt=2**53, strict=True, description="0: no limit")
    processes: int = Field(0, ge=0, lt=2**31, strict=True)


class InventoryItem(Request):
    """A rental as its worker sees it."""

    rental_id: Id
    username: Annotated[str, StringConstraints(pattern=r"^r-[a-z0-9]{1,30}$")]
    uid: int = Field(ge=100_000, lt=2**31, strict=True)
    epoch: int = Field(ge=1, lt=2**53, strict=True)
    state: Literal["locked", "running", "frozen"]


Inventory = Annotated[list[InventoryItem], Field(max_length=10_000)]


class PlacementOrder(Reply):
    rental_id: str
    epoch: int
    want: Want


class RegisterRequest(Request):
    hostname: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$")]
    ssh_host_keys: Annotated[list[PublicKey], Field(min_length=1, max_length=8)]
    slots: int = Field(1, ge=1, le=MAX_SLOTS)
    labels: Labels = {}
    boot_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{8,64}$")]
    agent_version: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.+-]{1,64}$")]
    inventory: Inventory = []


class RegisterReply(Reply):
    worker_id: str
    worker_token: str
    session_id: str
    heartbeat_interval_s: float
    lease_s: float
    door_answer_s: float = Field(description="How old the proxy's word that the manager cannot be reached may be")
    authorized_keys: list[str] = Field(description="Lines for root's authorized keys: the manager's own")
    placements: list[PlacementOrder]


class StartEnd(Request):
    """How the run of a start command ended that its worker has had. `unseen`: with the program that kept its output."""

    rental_id: Id
    epoch: int = Field(ge=1, lt=2**53, strict=True)
    run: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,16}@[A-Za-z0-9-]{0,64}$")]
    how: Annotated[str, StringConstraints(pattern=r"^(status [0-9]{1,3}|signal [0-9]{1,2}|unseen)$")]
    ago_s: float = Field(0, ge=0, le=1e9, strict=True)


FURTHER_FIELDS = ("start_ends",)
"""Fields of a heartbeat that a worker sends only to a manager that has said that it takes them: an older one refuses
what it does not know."""


class HeartbeatRequest(Request):
    """Numbers must be numbers: the manager reads most of these with another reader (api/heartbeat.py), as strictly."""

    session_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{8,64}$")]
    seq: int = Field(ge=0, lt=2**53, strict=True)
    load: Load = Load()
    inventory: Inventory = []
    lease_s: float = Field(
        0, ge=0, le=86_400, strict=True, description="The lease that the last reply gave it; 0: none yet"
    )
    start_ends: Annotated[list[StartEnd], Field(max_length=MAX_SLOTS)] = []
    vacating: bool = Field(
        False, strict=True, description="The worker was told to stop, and waits for its rentals to be taken away"
    )
    leaving: bool = Field(
        False, strict=True, description="The goodbye: the worker has stopped its rentals and is about to end"
    )


class HeartbeatReply(Reply):
    lease_s: float
    door_answer_s: float
    next_heartbeat_s: float
    placements: list[PlacementOrder]
    takes: list[str] = Field([], description="Fields that the next heartbeat may have as well: see FURTHER_FIELDS")


class RentRequest(Request):
    name: Name | None = None
    ssh_public_key: NamedKey | None = None
    ttl_s: Ttl = DEFAULT_TTL_S
    labels: Labels = {}
    start: StartCommand | None = Field(
        None, description="Run by its shell, in its home, whenever it comes to be on a worker"
    )
    wait_s: float = Field(DEFAULT_WAIT_S, ge=0, le=MAX_WAIT_S)


class SshAuthority(Reply):
    """By what a renter's ssh recognises every worker as that of a rental: its host certificate names the rental."""

    public_key: str
    known_hosts: str = Field(description="The line for a known_hosts file; the host's name is ID.orion (HostKeyAlias)")


class Key(Reply):
    """A key that opens a rental."""

    id: str
    fingerprint: str = Field(description="As ssh-keygen -l shows it")
    public_key: str
    comment: str = Field("", description="What it is called, as it was given: the platform makes nothing of it")
    in_place: bool = Field(description="Its worker has all keys as they are listed; false while that is under way")


class AddKeyRequest(Request):
    ssh_public_key: NamedKey
    wait_s: float = Field(DEFAULT_WAIT_S, ge=0, le=MAX_WAIT_S)


class CertificateRequest(Request):
    """A certificate for this key, which need not be one of the rental's."""

    ssh_public_key: PublicKey
    ttl_s: int = Field(MAX_CERTIFICATE_S, ge=MIN_TTL_S, le=MAX_CERTIFICATE_S, strict=True)


class CertificateReply(Reply):
    certificate: str = Field(description="The line for a file KEY-cert.pub; it opens this rental, until it moves")
    expires_at: datetime


class TerminalTicket(Reply):
    """For one terminal in a browser: the second subprotocol of the WebSocket, after `orion.terminal`."""

    ticket: str
    expires_in_s: float


class WebPort(Reply):
    """A port that the rental's processes may listen on, as the proxy shows it."""

    port: int
    public: bool = Field(description="Whether anybody may open it; else its owner, and admins")
    path: str = Field(pattern=r"^/[A-Za-z0-9/-]+$", description="Where it is on the platform's own address")
    host: str | None = Field(None, pattern=r"^[a-z0-9.-]+$", description="The host name of its own that it has as well")


class ExposeRequest(Request):
    public: bool = Field(strict=True)


class WebPortTicket(WebPort):
    """For one browser: the address /.orion/open/#RENTAL/PORT/TICKET, of either host, opens the port there."""

    ticket: str
    expires_in_s: float


class RenewRequest(Request):
    ttl_s: Ttl = DEFAULT_TTL_S


class Snapshot(Reply):
    """A complete copy of a rental's files, kept by the manager."""

    generation: str = Field(description="EPOCH-NUMBER; a later one has later files")
    at: datetime = Field(description="When it was begun, for the last time that the home was found to be like it")
    bytes: int
    files: int = Field(description="Files, directories and links")
    skipped: list[str] = Field(
        description="The first names of what could not be carried whole: it is missing, or lacks attributes or its mode"
    )
    salvage: bool = Field(False, description="What a lost worker still had when it came back: restored on request")


class Rental(Reply):
    id: str
    name: str
    owner: str
    state: RentalState
    epoch: int = Field(description="Rises with each placement; 0 before the first")
    worker_id: str | None
    moving_to: str | None = Field(None, description="The worker to which it is being moved, from the one that it is on")
    username: str
    ssh_host_keys: list[str] = Field(description="Of the worker it is on; empty while it is on none")
    labels: dict[str, str]
    ttl_s: int
    created_at: datetime
    expires_at: datetime | None = Field(
        description="Null before it was first active, and while its time is not counted as the clock is doubted"
    )
    last_safe_copy_at: datetime | None = Field(description="When the last complete copy of its files was begun")
    last_safe_copy_bytes: int | None = Field(None, description="What its files and directories take")
    copy_problem: str = Field("", description="Why its files cannot be copied at present")
    home_warning: str = Field(
        "", description="What its home holds, from 80 % of what it may hold; how often it is copied, if less than usual"
    )
    salvage: Snapshot | None = Field(
        None, description="The newest of what lost workers still had and it does not have; shown for a week"
    )
    start: str | None = Field(None, description="Its start command")
    start_problem: str = Field("", description="Why its start command is not run any more")
    start_end: str = Field(
        "", description="How its start command ended: status N, signal N or unseen; empty: it runs, or is about to"
    )
    start_ended_at: datetime | None = Field(None, description="When that was, by the word of its worker")
    public_ports: list[int] = Field([], description="The web ports that anybody may open")
    explanation: str = Field(description="Why it is in its state, for a person")


class RentReply(Rental):
    ssh_private_key: str | None = Field(None, description="Only in this reply, and only where no key was given")


class RestoreRequest(Request):
    """Exactly one of `generation` and `empty`."""

    generation: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,15}-[1-9][0-9]{0,15}$")] | None = None
    empty: bool = Field(False, description="Begin without any files")
    discard: bool = Field(False, description="Do not copy first what is there now")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.generation is not None) == self.empty:
            raise ValueError("give either generation or empty")
        return self


class Worker(Reply):
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
    worker_ids: list[Id] = Field(min_length=1, max_length=1000, description="Nothing is moved from one to another")


class Kept(Reply):
    id: str
    why: str = Field(description="Why this worker, which is down, is not forgotten")


class Pruned(Reply):
    forgotten: list[str]
    kept: list[Kept]


class TokenRequest(Request):
    name: Name
    role: Literal["client", "admin", "join"] = "client"
    ttl_s: int | None = Field(None, ge=MIN_TTL_S, le=MAX_TOKEN_TTL_S, strict=True)


class Token(Reply):
    id: str
    name: str
    role: Role
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class TokenReply(Token):
    token: str = Field(description="Shown this once; only its hash is kept")


class Event(Reply):
    id: int
    at: datetime
    kind: str = Field(description="Past tense, such as 'rental.activated'")
    actor: str
    reason: str
    owner: str | None
    rental_id: str | None
    worker_id: str | None
    epoch: int | None
    details: dict[str, Any] = {}


class LogEntry(Reply):
    """One job of the provisioning engine, when it had ended."""

    at: datetime
    action: str = Field(description="The playbook: create_user or delete_user")
    worker_id: str
    epoch: int
    ok: bool
    seconds: float = Field(description="From the order to the outcome")
    message: str


class Overdue(Reply):
    """Something that has been in a state for longer than it should."""

    kind: Literal["worker", "rental", "placement"]
    id: str
    name: str = Field(description="The hostname of a worker, the name of a rental")
    state: str
    since_s: float = Field(description="Counted from the start of the manager at the earliest")
    why: str
    what_to_do: str


class RentalName(Reply):
    id: str
    name: str
    owner: str


class RestorePlan(Reply):
    """What restoring a backup would do; `id` accepts it."""

    id: str
    last_event_at: datetime | None = Field(description="When the last thing happened that the backup knows")
    rentals: int = Field(description="Living ones in the backup")
    forgotten: list[RentalName] = Field(description="Living now and unknown to the backup")
    revived: list[RentalName] = Field(description="Ended since, and living in the backup")


class Restoring(Reply):
    kept_as: str = Field(description="The former database's file, beside the new one")


class Status(Reply):
    version: str
    brake: str | None = Field(description="Why no silent worker is declared down at present; null when nothing holds")
    workers: dict[str, int] = Field(description="Number of workers by health")
    rentals: dict[str, int] = Field(description="Number of living rentals by state")
    slots: int
    slots_free: int
    copies_paused: str | None = Field(None, description="Why no files are copied at present")
    clock: str | None = Field(None, description="Why the manager's clock is not believed, so that nobody expires")
    overdue: list[Overdue] = Field([], description="What has waited too long, why, and what to do")


class ManagerClock(Reply):
    problem: str | None = Field(description="Why the manager's clock is not believed; null: it is")


T = TypeVar("T")


class Page(Reply, Generic[T]):
    items: list[T]
    next: str | None = Field(None, description="Pass it as `after` for the next page; null at the end")


class Problem(Reply):
    """RFC 9457, as application/problem+json. `code` is stable; `detail` says what to do."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str = ""
    errors: list[dict[str, Any]] = []
