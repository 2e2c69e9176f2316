"""Access by owner: the admin creates tokens, and each token sees and ends only its own rentals."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Rent
from renter import Renter
from stack import Stack

from orion.client.sdk import Orion
from orion.errors import Forbidden, NotFound, Unauthorized


@pytest.fixture
def token_file(stack: Stack, renter: Renter, tmp_path: Path) -> Iterator[Path]:
    """Yield the token file of a client whose token was made by `orion`."""
    token = tmp_path / "token-of-bob"
    token.write_text(renter.orion("token", "create", "bob").stdout)
    yield token
    for one in renter.orion_json("token", "ls"):
        if one["name"] == "bob" and one["revoked_at"] is None:
            renter.orion("token", "revoke", one["id"], "--yes")


@pytest.fixture
def bob(stack: Stack, token_file: Path) -> Iterator[Orion]:
    with stack.connect(token_file.read_text().strip()) as orion:
        yield orion


def test_a_client_sees_and_ends_only_its_own_rentals(rent: Rent, renter: Renter, bob: Orion) -> None:
    admins = rent("of-the-admin")
    own = bob.rent(name="of-bob", ssh_public_key=renter.public_key)
    assert own.owner == "bob"
    assert [one.id for one in bob.rentals()] == [own.id]
    for forbidden in (bob.rental, bob.release, bob.renew):
        with pytest.raises(NotFound):
            forbidden(admins.id)
    assert renter.can_log_in(admins)
    assert {event.rental_id for event in bob.events()} == {own.id}


def test_a_client_cannot_open_a_connection_to_a_rental_of_another(
    stack: Stack, rent: Rent, renter: Renter, token_file: Path
) -> None:
    rental = rent("closed")
    refused = renter.ssh(rental, "true", ORION_URL=stack.url, ORION_TOKEN_FILE=str(token_file))
    assert refused.returncode == 255
    assert "there is no such rental" in refused.stderr
    assert renter.can_log_in(rental)


def test_two_owners_may_use_the_same_name(rent: Rent, renter: Renter, bob: Orion) -> None:
    assert rent("common").id != bob.rent(name="common", ssh_public_key=renter.public_key).id


def test_a_client_may_not_use_the_calls_of_an_operator(bob: Orion) -> None:
    with pytest.raises(Forbidden):
        list(bob.workers())
    with pytest.raises(Forbidden):
        bob.create_token("eve")


def test_a_revoked_token_is_refused_and_its_rentals_continue(
    stack: Stack, orion: Orion, renter: Renter, bob: Orion, token_file: Path
) -> None:
    own = bob.rent(name="goes-on", ssh_public_key=renter.public_key)
    header = f"Authorization: Bearer {token_file.read_text().strip()}"
    follow = ["curl", "-sN", "--max-time", "240", "-H", header, "-H", "Accept: text/event-stream"]
    with subprocess.Popen([*follow, f"{stack.url}/api/events"], stdout=subprocess.PIPE, text=True) as stream:
        assert stream.stdout
        assert any("rental.activated" in line for line in stream.stdout), "the stream has this client's events"
        renter.orion("token", "revoke", "bob", "--yes")
        stream.stdout.read()
        assert stream.wait() == 0, "its connection ended in order, and not by curl's own limit"
    with pytest.raises(Unauthorized) as refusal:
        list(bob.rentals())
    assert refusal.value.status == 401
    assert renter.can_log_in(own)

    replaced = renter.orion("token", "create", "bob").stdout.strip()
    with stack.connect(replaced) as again:
        assert [one.id for one in again.rentals()] == [own.id], "the owner is the token's name"
    assert orion.rental(own.id).owner == "bob"
