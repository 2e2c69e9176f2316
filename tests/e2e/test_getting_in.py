"""A renter's log-in: real ssh through the proxy, with verification of the worker's host key."""

from __future__ import annotations

from pathlib import Path

from conftest import Rent
from renter import Renter, make_key
from stack import Stack

from orion.client.sdk import Orion
from orion.wire import RentalState


def test_a_command_runs_in_the_rental_and_its_status_and_streams_pass(rent: Rent, renter: Renter) -> None:
    rental = rent("shell")
    key = ["-i", str(renter.key)]
    done = renter.orion("ssh", *key, "shell", "echo out; echo err >&2; exit 7", status=7)
    assert (done.stdout, done.stderr.strip()) == ("out\n", "err")
    assert renter.orion("ssh", *key, rental.id, "id", "-un").stdout.strip() == rental.username


def test_the_command_remembers_which_key_opens_which_rental(stack: Stack, renter: Renter) -> None:
    renter.orion("rent", "--name", "remembered", "--key", str(renter.key))
    assert renter.orion("ssh", "remembered", "echo", "in").stdout == "in\n"
    renter.orion("release", "remembered", "--yes")


def test_a_shell_at_a_terminal_has_its_size_and_ends_with_its_status(rent: Rent, renter: Renter) -> None:
    rent("terminal")
    typed = "tty; stty size; echo $((6 * 7)); exit 3\n"
    status, screen = renter.at_a_terminal(["ssh", "-i", str(renter.key), "terminal"], 33, 99, typed)
    assert status == 3, screen
    assert "/dev/pts/" in screen
    assert "33 99" in screen
    assert "42" in screen


def test_a_binary_stream_passes_unchanged_in_both_directions(rent: Rent, renter: Renter) -> None:
    rental = rent()
    renter.inside(rental, "head -c 5000000 /dev/urandom > data")
    here = renter.inside(rental, "sha256sum < data")
    there = renter.inside(rental, "cat data | cat | sha256sum")
    assert here == there
    assert renter.receives(rental, "cat data") == here.split()[0]


def test_a_rental_refuses_another_key(rent: Rent, renter: Renter, tmp_path: Path) -> None:
    rental = rent()
    other = renter.ssh(rental, "true", make_key(tmp_path / "other"))
    assert other.returncode == 255
    assert "Permission denied (publickey)" in other.stderr
    assert renter.can_log_in(rental), "its own key still opens it"


def test_ssh_refuses_the_worker_of_another_rental(rent: Rent, renter: Renter) -> None:
    rental, other = rent(), rent()
    command = renter.arguments(rental, "true")
    alias = command.index(f"HostKeyAlias={rental.id}.orion")
    refused = renter.run([*command[:alias], f"HostKeyAlias={other.id}.orion", *command[alias + 1 :]])
    assert refused.returncode == 255
    assert "Host key verification failed" in refused.stderr
    assert renter.can_log_in(rental)


def test_a_rent_without_a_key_returns_a_private_key_that_opens_the_rental(
    orion: Orion, renter: Renter, tmp_path: Path
) -> None:
    rental = orion.rent(name="made-key", idempotency_key="made-key-once")
    assert rental.state is RentalState.ACTIVE
    assert rental.ssh_private_key is not None
    key = _private(tmp_path / "made", rental.ssh_private_key)
    assert renter.ssh(rental, "true", key).returncode == 0
    assert orion.rental(rental.id).model_extra is None, "no later reply has it"

    again = orion.rent(name="made-key", idempotency_key="made-key-once")
    assert again.id == rental.id
    assert again.ssh_private_key not in {None, rental.ssh_private_key}
    assert renter.ssh(again, "true", _private(tmp_path / "again", str(again.ssh_private_key))).returncode == 0
    assert renter.ssh(again, "true", key).returncode == 255, "a replay makes a new pair, and it alone counts"


def _private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path
