"""The whole manager, its real store and routes, on virtual time: see support/harness.py."""

from __future__ import annotations

import pytest
from support.fixtures import _plain_log, database, harness, migrated_database, sshds, statements, store  # noqa: F401
from support.harness import Harness
from support.short_tokens import Short


@pytest.fixture(params=[False, True], ids=["revoked", "its time is over"])
def short(harness: Harness, request: pytest.FixtureRequest) -> Short:  # noqa: F811
    return Short(harness, request.param)
