"""The store that some tests need: see support/fixtures.py."""

from __future__ import annotations

from support.fixtures import _plain_log, database, migrated_database, statements, store  # noqa: F401
