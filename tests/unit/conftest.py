"""The store, the scripted platform and `orion`, which some tests need: see support/."""

from __future__ import annotations

from support.fixtures import _plain_log, database, migrated_database, statements, store  # noqa: F401
from support.orion_command import orion, platform, scripted_server  # noqa: F401
