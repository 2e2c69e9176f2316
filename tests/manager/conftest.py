"""The whole manager, its real store and routes, on virtual time: see support/house.py."""

from __future__ import annotations

from support.fixtures import _plain_log, database, house, migrated_database, sshds, statements, store  # noqa: F401
