"""A rental from rent to release through the proxy, without failures."""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime, timedelta

import pytest
from conftest import Figures, Rent
from renter import Renter
from stack import Stack, story

from orion.client.sdk import Orion
from orion.errors import Conflict
from orion.wire import Rental, RentalState

SAMPLES = 30


def test_one_request_rents_an_environment(stack: Stack, renter: Renter) -> None:
    reply = stack.post("/api/rent", {"name": "one-request", "ssh_public_key": renter.public_key})
    assert reply.status_code == 201, reply.text
    rental = Rental.model_validate_json(reply.content)
    assert rental.state is RentalState.ACTIVE
    assert reply.headers["Location"] == f"/api/rentals/{rental.id}"
    assert rental.username == f"r-{rental.id}"
    assert renter.inside(rental, "id -un; pwd") == f"{rental.username}\n/home/{rental.username}"


def test_an_invalid_key_is_refused_before_anything_is_created(stack: Stack, orion: Orion, renter: Renter) -> None:
    before = {one.id for one in orion.rentals(ended=True)}
    bad = 'command="rm -rf /" ' + renter.public_key
    reply = stack.post("/api/rent", {"ssh_public_key": bad})
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_request")
    assert {one.id for one in orion.rentals(ended=True)} == before


def test_the_same_idempotency_key_never_rents_twice(orion: Orion, renter: Renter) -> None:
    key = "idempotent-through-the-proxy"
    first = orion.rent(ssh_public_key=renter.public_key, idempotency_key=key)
    again = orion.rent(ssh_public_key=renter.public_key, idempotency_key=key)
    assert (again.id, again.state) == (first.id, RentalState.ACTIVE)
    assert [one.id for one in orion.rentals(name=first.name)] == [first.id]
    with pytest.raises(Conflict) as refusal:
        orion.rent(ssh_public_key=renter.public_key, ttl_s=7200, idempotency_key=key)
    assert refusal.value.code == "idempotency_conflict"


def test_a_name_is_taken_as_long_as_its_rental_lives(orion: Orion, rent: Rent) -> None:
    first = rent("only-one")
    with pytest.raises(Conflict) as refusal:
        rent("only-one")
    assert refusal.value.code == "name_taken"
    assert orion.release(first.id, wait_s=30).state is RentalState.RELEASED
    assert rent("only-one").id != first.id


def test_labels_and_names_are_kept_and_found(orion: Orion, rent: Rent, renter: Renter) -> None:
    labelled = orion.rent(name="labelled", ssh_public_key=renter.public_key, labels={"team": "blue", "course": "iac"})
    other = rent()
    assert orion.rental(labelled.id).labels == {"team": "blue", "course": "iac"}
    assert {labelled.id, other.id} <= {one.id for one in orion.rentals()}
    assert {one.id for one in orion.rentals(limit=1)} == {one.id for one in orion.rentals()}, "page by page"
    assert [one.id for one in orion.rentals(name="labelled")] == [labelled.id]
    assert other.name
    assert other.name != "labelled"
    orion.release(labelled.id, wait_s=30)
    assert list(orion.rentals(name="labelled")) == []
    assert labelled.id in {one.id for one in orion.rentals(name="labelled", ended=True)}


LEAVE_TRACES = """
nohup sh -c 'while :; do sleep 1; done' >/dev/null 2>&1 &
setsid sh -c 'while :; do sleep 1; done' >/dev/null 2>&1 &
(trap '' TERM HUP INT; while :; do sleep 1; done) >/dev/null 2>&1 &
mkdir -p /tmp/mine/deep
for place in ~ /tmp /tmp/mine/deep /var/tmp /dev/shm; do echo here > $place/left-behind; done
chmod 000 /tmp/mine/deep
id -u
"""


def test_a_release_leaves_nothing_behind(stack: Stack, orion: Orion, rent: Rent, renter: Renter) -> None:
    rental = rent("untidy")
    uid = renter.inside(rental, LEAVE_TRACES)
    worker = stack.container_of(rental.worker_id).id
    everywhere = ["find", "/", "-path", "/proc", "-prune", "-o", "(", "-uid", uid, "-o", "-gid", uid, ")", "-print"]
    processes = ["pgrep", "-U", uid]
    account = ["getent", "passwd", rental.username]
    assert len(stack.exec(worker, *processes).stdout.split()) >= 3
    assert stack.exec(worker, *everywhere).stdout.count("left-behind") == 5
    assert stack.exec(worker, *account).returncode == 0

    assert orion.release(rental.id, wait_s=30).state is RentalState.RELEASED
    assert stack.exec(worker, *processes).stdout == ""
    assert stack.exec(worker, *everywhere).stdout == ""
    assert stack.exec(worker, *account).returncode == 2
    assert stack.exec(worker, "grep", "-rs", rental.username, "/etc").stdout == ""

    (purged,) = (one for one in stack.events(0, rental.id) if one.kind == "placement.purged")
    assert "looked" in purged.reason
    assert purged.worker_id == rental.worker_id
    report = purged.details["report"]
    assert report["left"] == []
    assert {"processes", "accounts", "/", "/dev/shm"} <= set(report["looked"])  # noqa: S108 - places that it searched
    assert report["killed"] >= 3
    assert report["removed_files"] >= 5


def test_a_release_may_be_repeated_and_an_ended_rental_cannot_be_renewed(orion: Orion, rent: Rent) -> None:
    rental = rent()
    assert orion.release(rental.id, wait_s=30).state is RentalState.RELEASED
    assert orion.release(rental.id).state is RentalState.RELEASED
    with pytest.raises(Conflict) as refusal:
        orion.renew(rental.id, 3600)
    assert refusal.value.code == "ended"


def test_a_renewal_sets_the_end_of_a_rental_anew_from_now(stack: Stack, orion: Orion, rent: Rent) -> None:
    rental = rent(ttl_s=600)
    assert rental.expires_at is not None
    renewed = orion.renew(rental.id, 7200)
    assert renewed.expires_at is not None
    from_now = renewed.expires_at - datetime.now(UTC)
    assert timedelta(seconds=7180) < from_now <= timedelta(seconds=7200)
    assert stack.post(f"/api/rentals/{rental.id}/renew", {"ttl_s": 59}).status_code == 422


def test_the_command_rents_shows_renews_and_releases(renter: Renter) -> None:
    rented = renter.orion_json("rent", "--name", "by-command", "--ttl", "2h", "--label", "made-by=command")
    assert (rented["state"], rented["ttl_s"], rented["labels"]) == ("active", 7200, {"made-by": "command"})
    assert "by-command" in renter.orion("ls").stdout
    assert renter.orion_json("show", "by-command")["id"] == rented["id"]
    assert renter.orion_json("renew", "by-command", "--ttl", "4h")["ttl_s"] == 4 * 3600
    assert "name" in renter.orion("rent", "--name", "by-command", status=6).stderr
    renter.orion("release", "by-command", "--yes")
    assert renter.orion_json("ls") == [] or "by-command" not in renter.orion("ls").stdout
    renter.orion("ssh", "by-command", "true", status=6)
    renter.orion("show", "never-rented", status=3)


def test_thirty_rents_in_a_row_are_measured(orion: Orion, renter: Renter, figures: Figures) -> None:
    rents: list[float] = []
    releases: list[float] = []
    for _ in range(SAMPLES):
        began = time.monotonic()
        rental = orion.rent(ssh_public_key=renter.public_key)
        rents.append(time.monotonic() - began)
        assert rental.state is RentalState.ACTIVE, rental.explanation
        began = time.monotonic()
        assert orion.release(rental.id, wait_s=30).state is RentalState.RELEASED
        releases.append(time.monotonic() - began)
    figures[f"rent to 201, {SAMPLES} in a row"] = _percentiles(rents)
    figures[f"release to its end, {SAMPLES} in a row"] = _percentiles(releases)


def _percentiles(seconds: list[float]) -> str:
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return f"p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s"


def test_an_expired_rental_is_ended_and_purged_without_a_request(
    stack: Stack, orion: Orion, short_rental: Rental
) -> None:
    ended = orion.rental(short_rental.id, state=RentalState.EXPIRED, wait_s=55)
    if ended.state is not RentalState.EXPIRED:
        ended = orion.rental(short_rental.id, state=RentalState.EXPIRED, wait_s=55)
    assert ended.state is RentalState.EXPIRED, story(stack.events(0, short_rental.id))

    events = {event.kind: event for event in stack.events(0, short_rental.id)}
    assert short_rental.expires_at is not None
    assert events["rental.release_started"].actor == "expiry"
    lateness = (events["rental.expired"].at - short_rental.expires_at).total_seconds()
    assert 0 <= lateness < 10
    assert events["placement.purged"].details["report"]["left"] == []
    worker = stack.container_of(short_rental.worker_id)
    assert stack.exec(worker.id, "getent", "passwd", short_rental.username).returncode == 2
