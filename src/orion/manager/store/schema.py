"""The tables. Partial unique indexes and checks enforce the invariants in the database as well.

Tables and columns keep their released names. A column with a `key` has that name in statements and in the records of
domain/model.py; rows that are read have the released names, as the API has.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("hostname", String(253), nullable=False),
    Column("address", String(45), nullable=False, index=True),
    Column("host_keys", JSON, nullable=False),
    Column("slots", Integer, CheckConstraint("slots > 0", name="slots"), nullable=False),
    Column("labels", JSON, nullable=False),
    Column("health", String(16), nullable=False),
    Column("intent", String(16), nullable=False),
    Column("token_hash", String(64), nullable=False),
    Column("session_id", String(64)),
    Column("verified_session", String(64)),
    Column("boot_id", String(64), nullable=False),
    Column("agent_version", String(64), nullable=False),
    Column("fault", Text, nullable=False, server_default=""),
    Column("explanation", Text, nullable=False, server_default=""),
    Column("load", JSON, nullable=False),
    Column("registered_at", Float, nullable=False),
    Column("last_heartbeat_at", Float),
)

LIVING = "rentals.state NOT IN ('released', 'expired', 'failed')"
"""The condition of the partial indexes; a query that is to use one must repeat it literally."""
_LIVING = text(LIVING.removeprefix("rentals."))

rentals = Table(
    "rentals",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("username", String(32), nullable=False, unique=True),
    Column("uid", Integer, CheckConstraint("uid >= 100000", name="uid"), nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("public_key", Text, nullable=False),
    Column("ttl_s", Integer, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("activated_at", Float),
    Column("expires_at", Float),
    Column("end", String(16)),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("explanation", Text, nullable=False, server_default=""),
    Column("last_safe_copy_at", Float, key="last_snapshot_at"),
    Column("last_safe_copy_bytes", BigInteger, key="last_snapshot_bytes"),
    Column("copy_problem", Text, nullable=False, server_default="", key="snapshot_problem"),
    Column("restore_from", String(40)),
    Column("let_in_epoch", BigInteger, nullable=False, server_default="0", key="activated_epoch"),
    Column("began_with", String(40), nullable=False, server_default=""),
    Column("lineage", JSON, nullable=False, server_default="[]"),
    Column("home_warning", Text, nullable=False, server_default=""),
    Column("start", Text, nullable=False, server_default=""),
    Column("start_run", Integer, nullable=False, server_default="1"),
    Column("start_problem", Text, nullable=False, server_default=""),
    Column("takeovers", JSON, nullable=False, server_default="[]"),
    Column("last_epoch", Integer, nullable=False, server_default="0"),
    Column("public_ports", JSON, nullable=False, server_default="[]"),
    Column("key_comments", JSON, nullable=False, server_default="{}"),
    Index(
        "uq_rentals_living_name",
        "owner",
        "name",
        unique=True,
        sqlite_where=_LIVING,
        postgresql_where=_LIVING,
    ),
    Index("ix_rentals_state", "state"),
    # Lists of living rentals, of one owner's, of one name, and rentals that expire: each without a scan of the table.
    Index("ix_rentals_living", "id", sqlite_where=_LIVING, postgresql_where=_LIVING),
    Index("ix_rentals_owner_id", "owner", "id"),
    Index("ix_rentals_name", "name"),
    Index("ix_rentals_due", "expires_at", sqlite_where=_LIVING, postgresql_where=_LIVING),
)

_LIVE = text("state IN ('reserved', 'preparing', 'running') AND NOT standby")
STANDBY = "state IN ('reserved', 'preparing', 'running') AND standby"
"""The condition of a target placement: one that a planned migration which is not over has reserved."""
_STANDBY = text(STANDBY)
_HOLDING = text("state IN ('reserved', 'preparing', 'running', 'stopping', 'stopped', 'failed')")

placements = Table(
    "placements",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("rental_id", String(64), ForeignKey("rentals.id"), nullable=False),
    Column("worker_id", String(64), nullable=False),
    Column("slot", Integer, CheckConstraint("slot >= 0", name="slot"), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("public_key", Text, nullable=False, server_default=""),
    Column("standby", Boolean, nullable=False, server_default=false(), key="is_target"),
    Column("held", Integer, nullable=False, server_default="0", key="quiesced_for"),
    Column("filled", String(40), nullable=False, server_default="", key="target_snapshot"),
    Column("created_at", Float, nullable=False),
    Column("started", String(100), nullable=False, server_default="", key="start_mark"),
    Column("salvaged", Boolean, nullable=False, server_default=false(), key="files_recovered"),
    Column("start_end", String(20), nullable=False, server_default=""),
    Column("start_ended_at", Float),
    UniqueConstraint("rental_id", "epoch"),
    # Never two live placements of a rental, two target placements of one, or two placements in one slot.
    Index("uq_placements_live", "rental_id", unique=True, sqlite_where=_LIVE, postgresql_where=_LIVE),
    Index("uq_placements_standby", "rental_id", unique=True, sqlite_where=_STANDBY, postgresql_where=_STANDBY),
    Index("uq_placements_slot", "worker_id", "slot", unique=True, sqlite_where=_HOLDING, postgresql_where=_HOLDING),
    Index("ix_placements_state", "state"),
    Index("ix_placements_worker_id_state", "worker_id", "state"),
)

copies = Table(
    "copies",
    metadata,
    Column("rental_id", String(64), ForeignKey("rentals.id"), primary_key=True),
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("files", BigInteger, nullable=False),
    Column("skipped", JSON, nullable=False),
    Column("salvage", Boolean, nullable=False, server_default=false(), key="recovered"),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_hash", String(64), nullable=False),
    Column("rental_id", String(64), ForeignKey("rentals.id"), nullable=False),
    Column("created_at", Float, nullable=False, index=True),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("actor", String(64), nullable=False),
    Column("reason", Text, nullable=False),
    Column("owner", String(64), index=True),
    Column("rental_id", String(64), index=True),
    Column("worker_id", String(64), index=True),
    Column("epoch", Integer),
    Column("details", JSON, nullable=False),
    sqlite_autoincrement=True,
)

engine_log = Table(
    "engine_log",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("rental_id", String(64), nullable=False, index=True),
    Column("epoch", Integer, nullable=False),
    Column("action", String(32), nullable=False),
    Column("worker_id", String(64), nullable=False),
    Column("ok", Boolean, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("message", Text, nullable=False),
    sqlite_autoincrement=True,
)

counters = Table(
    "counters",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", Integer, nullable=False),
)
