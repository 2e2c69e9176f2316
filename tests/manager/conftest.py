"""The whole manager, its real store and routes, on virtual time: see support/house.py."""

from __future__ import annotations

import pytest
from support.fixtures import _plain_log, database, house, migrated_database, sshds, statements, store  # noqa: F401
from support.house import House
from support.short_tokens import Short


@pytest.fixture(params=[False, True], ids=["revoked", "its time is over"])
def short(house: House, request: pytest.FixtureRequest) -> Short:  # noqa: F811
    return Short(house, request.param)
