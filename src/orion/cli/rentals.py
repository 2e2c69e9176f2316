"""rent, ls, show, renew, migrate, release."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from orion import login
from orion.cli import config_ssh, durations, keys, output
from orion.cli.session import AsJson, RentalName, Yes, confirm, platform
from orion.client import ENDED
from orion.errors import AlreadyEnded, InvalidInput, NotMigrated, OrionError, StillWaiting
from orion.wire import (
    DEFAULT_TTL_S,
    DEFAULT_WAIT_S,
    MAX_TTL_S,
    MAX_WAIT_S,
    MIN_TTL_S,
    LogEntry,
    Rental,
    RentalState,
)

Ttl = Annotated[str, typer.Option(metavar="DURATION", help="How long, from now: 90s, 30m, 2h, 7d, 1w; at most 30d.")]
Wait = Annotated[
    str, typer.Option(metavar="DURATION", help="How long to wait at most; 0 does not wait. It goes on all the same.")
]

DEFAULT_TTL = durations.exact(DEFAULT_TTL_S)
DEFAULT_WAIT = durations.exact(DEFAULT_WAIT_S)
DEFAULT_MOVE_WAIT = "10m"


def rent(
    name: Annotated[str | None, typer.Option(help="The rental's name. Without it a name is made up.")] = None,
    ttl: Ttl = DEFAULT_TTL,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Your public key. Without it orion uses a key of its own, made at the first time."
        ),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label of yours; may be repeated.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="COMMAND",
            help="A command that the rental's shell runs at the beginning, and again after each move.",
        ),
    ] = None,
    wait: Wait = DEFAULT_WAIT,
    as_json: AsJson = False,
) -> None:
    """Rent an environment, and say how to get in."""
    within_s, labels = durations.parse(wait), _labels(label or [])
    ttl_s = durations.within(ttl, "--ttl", MIN_TTL_S, MAX_TTL_S)
    login.load()  # whoever is not logged in is told so before a key is made
    public_key, identity = keys.public_key(key)
    asked: dict[str, Any] = {
        "name": name,
        "ssh_public_key": public_key,
        "ttl_s": ttl_s,
        "labels": labels,
        "start": start,
    }
    asked["idempotency_key"] = secrets.token_urlsafe(24)
    try:
        with platform("renting") as (orion, tell):
            rental: Rental = orion.rent(**asked, wait_s=min(within_s, MAX_WAIT_S))
            keys.remember(rental.id, identity)
            if rental.state is not RentalState.ACTIVE and within_s > MAX_WAIT_S:
                left_s = within_s - MAX_WAIT_S
                rental = orion.wait_for(rental.id, RentalState.ACTIVE, left_s, lambda one: tell(situation(one)))
    except KeyboardInterrupt:
        _say_what_is_rented(asked, identity)
        raise
    config_ssh.refresh()
    _report_rented(rental, as_json)


def _say_what_is_rented(asked: dict[str, Any], identity: Path) -> None:
    """Say what Ctrl-C leaves behind. The same request with the same key is answered with the same rental."""
    output.note("")
    try:
        with platform("asking what was rented") as (orion, _tell):
            rental = orion.rent(**asked, wait_s=0, retry_for_s=0)
    except (KeyboardInterrupt, OrionError):
        output.note("orion: it may have been rented all the same; see: orion ls")
        return
    keys.remember(rental.id, identity)
    config_ssh.refresh()
    name = output.plain(rental.name)
    output.note(f"orion: {output.plain(situation(rental))}. It stays rented; get in with: orion ssh {name}")
    output.note(f"  end it with: orion release {name}")


def _end(rental: Rental) -> str:
    """`in 3 h`; of one whose time is not counted yet, how much that is."""
    return output.when(rental.expires_at, f"{durations.exact(rental.ttl_s)} after its time has begun")


def _report_rented(rental: Rental, as_json: bool) -> None:
    if as_json:
        output.emit(rental)
    if rental.state in ENDED or rental.state is RentalState.RELEASING:
        raise AlreadyEnded(situation(rental))
    if rental.state is not RentalState.ACTIVE:
        raise StillWaiting(f"{situation(rental)}. It stays rented; get in with: orion ssh {rental.name}")
    if not as_json:
        output.say(f"{output.plain(rental.name)} is yours, and ends {_end(rental)}.")
        output.say(f"Get in with: orion ssh {output.plain(rental.name)}")


def ls(
    ended: Annotated[bool, typer.Option("--ended", "-a", help="Show those that have ended as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """List your rentals; an admin sees everybody's."""
    with platform() as (orion, _tell):
        rentals = list(orion.rentals(ended=ended))
    if as_json:
        return output.emit(rentals)
    if not rentals:
        return output.note("nothing is rented; try: orion rent")
    owners = len({one.owner for one in rentals}) > 1
    headings = ["NAME", "ID", "STATE", "WORKER", "ENDS", "LAST COPY", "SIZE", *(["OWNER"] if owners else [])]
    output.table(headings, [_row(one, owners) for one in rentals], wide="NAME")
    for one in rentals:
        if one.state not in {RentalState.ACTIVE, RentalState.RELEASED} and one.explanation:
            output.say(f"{output.plain(one.name)}: {output.plain(one.explanation)}")
        for notice in notices(one):
            output.say(notice)
        if one.start_problem:
            output.say(f"{output.plain(one.name)}: {output.plain(one.start_problem)}")
    return None


def show(
    rental: RentalName,
    log: Annotated[bool, typer.Option("--log", help="Show what was done for it on workers instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show everything about a rental, also one that has ended."""
    with platform() as (orion, _tell):
        found = orion.find_rental(rental, ended=True)
        entries = list(orion.rental_log(found.id)) if log else []
    if log:
        return _show_log(entries, as_json)
    if as_json:
        return output.emit(found)
    output.fields(_everything(found))
    if found.state not in ENDED:
        output.say(f"\nGet in with: orion ssh {output.plain(found.name)}")
    return None


def start(rental: RentalName, as_json: AsJson = False) -> None:
    """Run a rental's start command now.

    This is also the way on where it is not run any more by itself. What still runs of it is left alone.
    """
    with platform() as (orion, _tell):
        asked = orion.start(orion.find_rental(rental).id)
    if as_json:
        return output.emit(asked)
    name = output.plain(asked.name)
    return output.say(f"{name} runs its start command; see what that says with: orion logs {name}")


def thaw(rental: RentalName, as_json: AsJson = False) -> None:
    """Let a rental go on that is frozen for its size.

    Its home holds too much: there are ten minutes to remove files.
    """
    with platform() as (orion, _tell):
        before = orion.find_rental(rental)
        thawed = orion.thaw(before.id)
    if as_json:
        return output.emit(thawed)
    name = output.plain(thawed.name)
    if thawed.copy_problem in {"", before.copy_problem}:  # a thaw has a problem of its own: to be frozen again
        output.say(f"{name} was not frozen: nothing has changed.")
        return output.say(_not_copied(thawed)) if thawed.copy_problem else None
    output.say(f"{name} goes on: {output.plain(thawed.copy_problem)}.")
    return output.say(f"Remove files, or release it. Get in with: orion ssh {name}")


def renew(rental: RentalName, ttl: Ttl = DEFAULT_TTL, as_json: AsJson = False) -> None:
    """Give a rental a new time, counted from now."""
    ttl_s = durations.within(ttl, "--ttl", MIN_TTL_S, MAX_TTL_S)
    with platform() as (orion, _tell):
        renewed = orion.renew(orion.find_rental(rental).id, ttl_s)
    if as_json:
        return output.emit(renewed)
    return output.say(f"{output.plain(renewed.name)} ends {_end(renewed)}.")


def migrate(rental: RentalName, wait: Wait = DEFAULT_MOVE_WAIT, as_json: AsJson = False) -> None:
    """Move a rental to another worker, with all its files."""
    within_s = durations.parse(wait)
    with platform() as (orion, _tell):
        before = orion.find_rental(rental)
    goes_on = f"if the move of {before.name} has begun, it goes on by itself; see: orion show {before.name}"
    with platform(f"moving {before.name}", goes_on) as (orion, tell):
        moved = orion.migrate(before.id, wait_s=min(within_s, MAX_WAIT_S))
        if not _is_there(moved) and within_s > MAX_WAIT_S:
            moved = orion.wait_until_moved(before.id, within_s - MAX_WAIT_S, lambda one: tell(situation(one)))
    if as_json:
        output.emit(moved)
    if not _is_there(moved):
        raise StillWaiting(f"{situation(moved)}. It goes on by itself")
    if moved.worker_id == before.worker_id:
        raise NotMigrated(f"{moved.name} goes on where it is: {moved.explanation}")
    if not as_json:
        output.say(f"{output.plain(moved.name)} is on worker {output.plain(moved.worker_id or '-')} now.")


def _is_there(rental: Rental) -> bool:
    return rental.state in ENDED or (rental.state is RentalState.ACTIVE and rental.moving_to is None)


def release(rental: RentalName, yes: Yes = False, wait: Wait = DEFAULT_WAIT, as_json: AsJson = False) -> None:
    """End a rental: everything in it is deleted."""
    within_s = durations.parse(wait)
    with platform() as (orion, _tell):
        found = orion.find_rental(rental, ended=True)
    if found.state not in ENDED:
        confirm(f"Release {found.name} and delete everything in it?", yes)
    goes_on = f"if the release of {found.name} has begun, it goes on by itself; see: orion show {found.id}"
    with platform(f"releasing {found.name}", goes_on) as (orion, tell):
        released = orion.release(found.id, wait_s=min(within_s, MAX_WAIT_S))
        if released.state not in ENDED and within_s > MAX_WAIT_S:
            left_s = within_s - MAX_WAIT_S
            released = orion.wait_for(found.id, RentalState.RELEASED, left_s, lambda one: tell(situation(one)))
    keys.forget(found.id)
    config_ssh.refresh()
    if as_json:
        output.emit(released)
    if released.state not in ENDED:
        raise StillWaiting(f"{situation(released)}. It goes on by itself")
    if not as_json:
        output.say(f"{situation(released)}.")


def situation(rental: Rental) -> str:
    """`box is queued: no worker has a free slot`"""
    explanation = rental.explanation.rstrip(".")
    return f"{rental.name} is {rental.state.value}" + (f": {explanation}" if explanation else "")


def notices(rental: Rental) -> list[str]:
    """Return what the owner should know of a rental's files, a line each, fit for a terminal."""
    name, found = output.plain(rental.name), []
    if rental.copy_problem:
        found.append(_not_copied(rental))
    elif rental.home_warning:
        found.append(f"{name}: {output.plain(rental.home_warning)}")
    if rental.salvage:
        found.append(f"{name} does not have what a lost worker still had of it: {_salvage(rental)}")
    return found


def _not_copied(rental: Rental) -> str:
    return f"{output.plain(rental.name)} is not copied: {output.plain(rental.copy_problem)}"


def _salvage(rental: Rental) -> str:
    """`1-4, 12 kB, of 3 min ago: orion restore lab --from 1-4`"""
    if rental.salvage is None:
        return ""
    one, generation = rental.salvage, output.plain(rental.salvage.generation)
    restore = f"orion restore {output.plain(rental.name)} --from {generation}"
    return f"{generation}, {output.size(one.bytes)}, of {output.when(one.at)}: {restore}"


def _row(rental: Rental, owner: bool) -> list[str]:
    cells = [
        rental.name,
        rental.id,
        _state(rental),
        rental.worker_id or "-",
        output.when(rental.expires_at),
        output.when(rental.last_safe_copy_at) + ("!" if rental.copy_problem else ""),
        output.size(rental.last_safe_copy_bytes),
    ]
    return [*cells, rental.owner] if owner else cells


def _state(rental: Rental) -> str:
    """`active`, or `active (start: status 3)` where its start command does not run any more."""
    if not rental.start_end:
        return rental.state.value
    return f"{rental.state.value} (start: {rental.start_end.replace('unseen', 'ended')})"


def _start_end(rental: Rental) -> str:
    """`it ended with status 3, 2 min ago; what it said: orion logs lab; to run it again: orion start lab`"""
    kind, _, number = rental.start_end.partition(" ")
    words = {"status": f"it ended with status {number}", "signal": f"it was ended by signal {number}"}
    how, at, name = words.get(kind, "it has ended"), output.when(rental.start_ended_at), rental.name
    return f"{how}, {at}; what it said: orion logs {name}; to run it again: orion start {name}"


def _show_log(entries: list[LogEntry], as_json: bool) -> None:
    if as_json:
        return output.emit(entries)
    if not entries:
        return output.note("nothing was done for it yet")
    return output.table(
        ["WHEN", "ACTION", "WORKER", "EPOCH", "OUTCOME", "SECONDS", "MESSAGE"],
        [
            [
                output.when(one.at),
                one.action,
                one.worker_id,
                str(one.epoch),
                "done" if one.ok else "failed",
                f"{one.seconds:.3f}",
                one.message,
            ]
            for one in entries
        ],
        wide="MESSAGE",
    )


def _everything(rental: Rental) -> list[tuple[str, str]]:
    return [
        ("name", rental.name),
        ("id", rental.id),
        ("owner", rental.owner),
        ("state", rental.state.value),
        ("because", rental.explanation or "-"),
        ("worker", _where(rental)),
        ("epoch", str(rental.epoch)),
        ("user", rental.username),
        ("labels", output.labels(rental.labels)),
        ("time", durations.exact(rental.ttl_s)),
        ("rented", output.when(rental.created_at)),
        ("ends", _end(rental)),
        ("last copy", _last_copy(rental)),
        *([("home", rental.home_warning)] if rental.home_warning else []),
        *([("salvage", _salvage(rental))] if rental.salvage else []),
        *([("public ports", " ".join(map(str, rental.public_ports)))] if rental.public_ports else []),
        *([("start", rental.start), ("its log", f"orion logs {rental.name}")] if rental.start else []),
        *([("its end", _start_end(rental))] if rental.start_end else []),
        *([("not run", rental.start_problem)] if rental.start_problem else []),
    ]


def _where(rental: Rental) -> str:
    where = rental.worker_id or "-"
    return f"{where}, moving to {rental.moving_to}" if rental.moving_to else where


def _last_copy(rental: Rental) -> str:
    last = output.when(rental.last_safe_copy_at, "none")
    if rental.last_safe_copy_bytes is not None:
        last += f", {output.size(rental.last_safe_copy_bytes)}"
    return f"{last}; not copied now: {rental.copy_problem}" if rental.copy_problem else last


def _labels(written: list[str]) -> dict[str, str]:
    labels = {}
    for text in written:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"a label is KEY=VALUE, not {text!r}")
        labels[key] = value
    return labels
