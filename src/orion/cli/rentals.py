"""The commands rent, ls, show, start, thaw, renew, migrate and release."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from orion import login
from orion.cli import config_ssh, durations, keys, output
from orion.cli.session import AsJson, RentalName, Yes, ask, confirm, platform
from orion.client.sdk import ENDED
from orion.errors import Ended, InvalidInput, NotMigrated, OrionError, StillWaiting
from orion.wire import DEFAULT_TTL_S, DEFAULT_WAIT_S, MAX_TTL_S, MAX_WAIT_S, MIN_TTL_S, LogEntry, Rental, RentalState

Ttl = Annotated[str, Option(metavar="DURATION", help="The rental's time from now: 90s, 30m, 2h, 7d, 1w; at most 30d.")]
Wait = Annotated[str, Option(metavar="DURATION", help="How long to wait; 0: not at all. The platform continues.")]

DEFAULT_TTL = durations.exact(DEFAULT_TTL_S)
DEFAULT_WAIT = durations.exact(DEFAULT_WAIT_S)


def rent(
    name: Annotated[str | None, Option(help="The rental's name. Default: a random name.")] = None,
    ttl: Ttl = DEFAULT_TTL,
    key: Annotated[
        Path | None, Option(metavar="FILE", help="Your public key. Default: a key that orion makes.")
    ] = None,
    label: Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="A label; may be repeated.")] = None,
    start: Annotated[
        str | None, Option(metavar="COMMAND", help="A shell command that runs at first and on each new worker.")
    ] = None,
    wait: Wait = DEFAULT_WAIT,
    as_json: AsJson = False,
) -> None:
    """Rent an environment."""
    within_s, labels = durations.parse(wait), _labels(label or [])
    ttl_s = durations.within(ttl, "--ttl", MIN_TTL_S, MAX_TTL_S)
    login.load()  # first, so that no key is made without a login
    public_key, identity = keys.public_key(key)
    request: dict[str, Any] = {"name": name, "ssh_public_key": public_key, "ttl_s": ttl_s, "labels": labels}
    request |= {"start": start, "idempotency_key": secrets.token_urlsafe(24)}
    try:
        with platform("renting") as (orion, tell):
            rental: Rental = orion.rent(**request, wait_s=min(within_s, MAX_WAIT_S))
            keys.remember(rental.id, identity)
            if rental.state is not RentalState.ACTIVE and within_s > MAX_WAIT_S:
                left_s = within_s - MAX_WAIT_S
                rental = orion.wait_for(rental.id, RentalState.ACTIVE, left_s, lambda one: tell(situation(one)))
    except KeyboardInterrupt:
        _report_interrupted(request, identity)
        raise
    config_ssh.refresh()
    _report_rented(rental, as_json)


def _report_interrupted(request: dict[str, Any], identity: Path) -> None:
    """Print what was rented before Ctrl-C. Sent again with the same key, the request returns the same rental."""
    output.note("")
    try:
        with platform("checking what was rented") as (orion, _tell):
            rental = orion.rent(**request, wait_s=0, retry_for_s=0)
    except (KeyboardInterrupt, OrionError):
        output.note("orion: the rental may have been made; see: orion ls")
        return
    keys.remember(rental.id, identity)
    config_ssh.refresh()
    name = output.plain(rental.name)
    output.note(f"orion: {output.plain(situation(rental))}. It stays rented. To log in, run: orion ssh {name}")
    output.note(f"  To end it, run: orion release {name}")


def _end(rental: Rental) -> str:
    """Return when the rental ends, such as `in 3 h`, or its time if that is not counted yet."""
    return output.when(rental.expires_at, f"{durations.exact(rental.ttl_s)} after its time begins")


def _report_rented(rental: Rental, as_json: bool) -> None:
    if as_json:
        output.emit(rental)
    if rental.state in ENDED or rental.state is RentalState.RELEASING:
        raise Ended(situation(rental))
    if rental.state is not RentalState.ACTIVE:
        raise StillWaiting(f"{situation(rental)}. It stays rented. To log in later, run: orion ssh {rental.name}")
    if not as_json:
        output.say(f"{output.plain(rental.name)} is rented and ends {_end(rental)}.")
        output.say(f"To log in, run: orion ssh {output.plain(rental.name)}")


def ls(
    ended: Annotated[bool, Option("--ended", "-a", help="Also show ended rentals.")] = False, as_json: AsJson = False
) -> None:
    """List your rentals; an admin sees all."""
    rentals = ask(lambda orion: list(orion.rentals(ended=ended)))
    if as_json:
        return output.emit(rentals)
    if not rentals:
        return output.note("there are no rentals. To rent an environment, run: orion rent")
    owners = len({one.owner for one in rentals}) > 1
    headings = ["NAME", "ID", "STATE", "WORKER", "ENDS", "SNAPSHOT", "SIZE", *(["OWNER"] if owners else [])]
    output.table(headings, [_row(one, owners) for one in rentals], wide="NAME")
    for one in rentals:
        if one.state not in {RentalState.ACTIVE, RentalState.RELEASED} and one.explanation:
            output.say(output.plain(f"{one.name}: {one.explanation}"))
        for notice in [*notices(one), *([f"{one.name}: {one.start_problem}"] if one.start_problem else [])]:
            output.say(output.plain(notice))
    return None


def show(
    rental: RentalName,
    log: Annotated[bool, Option("--log", help="Show its provisioning jobs on workers instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a rental's details, even after its end."""
    with platform() as (orion, _tell):
        found = orion.find_rental(rental, ended=True)
        entries = list(orion.rental_log(found.id)) if log else []
    if log:
        return _show_log(entries, as_json)
    if as_json:
        return output.emit(found)
    output.fields(_details(found))
    if found.state not in ENDED:
        output.say(f"\nTo log in, run: orion ssh {output.plain(found.name)}")
    return None


def start(rental: RentalName, as_json: AsJson = False) -> None:
    """Run a rental's start command now.

    This also works if the platform no longer runs it by itself. Processes of an earlier run are not stopped.
    """
    started = ask(lambda orion: orion.start(orion.find_rental(rental).id))
    name = started.name
    output.result(started, as_json, f"{name} runs its start command. To see its output, run: orion logs {name}")


def thaw(rental: RentalName, as_json: AsJson = False) -> None:
    """Thaw a rental whose home is too large.

    The owner has ten minutes to remove files. If the home is still too large then, the rental is frozen again.
    """
    with platform() as (orion, _tell):
        before = orion.find_rental(rental)
        thawed = orion.thaw(before.id)
    name, problem = thawed.name, thawed.copy_problem
    if problem in {"", before.copy_problem}:  # a thaw sets another problem: the time of the next freeze
        unchanged = [f"{name} was not frozen: nothing has changed.", *([_no_snapshot(thawed)] if problem else [])]
        return output.result(thawed, as_json, *unchanged)
    log_in = f"Remove files, or release the rental. To log in, run: orion ssh {name}"
    return output.result(thawed, as_json, f"{name} runs again: {problem}.", log_in)


def renew(rental: RentalName, ttl: Ttl = DEFAULT_TTL, as_json: AsJson = False) -> None:
    """Set a rental's time, counted from now."""
    ttl_s = durations.within(ttl, "--ttl", MIN_TTL_S, MAX_TTL_S)
    renewed = ask(lambda orion: orion.renew(orion.find_rental(rental).id, ttl_s))
    output.result(renewed, as_json, f"{renewed.name} ends {_end(renewed)}.")


def migrate(rental: RentalName, wait: Wait = "10m", as_json: AsJson = False) -> None:
    """Migrate a rental to another worker.

    It keeps all its files. Its processes end, and its start command runs again.
    """
    within_s = durations.parse(wait)
    before = ask(lambda orion: orion.find_rental(rental))
    if_interrupted = f"if the migration of {before.name} has begun, it continues; see: orion show {before.name}"
    with platform(f"migrating {before.name}", if_interrupted) as (orion, tell):
        after = orion.migrate(before.id, wait_s=min(within_s, MAX_WAIT_S))
        if not _is_settled(after) and within_s > MAX_WAIT_S:
            after = orion.wait_until_moved(before.id, within_s - MAX_WAIT_S, lambda one: tell(situation(one)))
    if as_json:
        output.emit(after)
    if not _is_settled(after):
        raise StillWaiting(f"{situation(after)}. The migration continues by itself")
    if after.worker_id == before.worker_id:
        raise NotMigrated(f"{after.name} stays on its worker: {after.explanation}")
    if not as_json:
        output.say(output.plain(f"{after.name} is on worker {after.worker_id or '-'} now."))


def _is_settled(rental: Rental) -> bool:
    """Return whether the rental has ended, or is active and not migrating."""
    return rental.state in ENDED or (rental.state is RentalState.ACTIVE and rental.moving_to is None)


def release(rental: RentalName, yes: Yes = False, wait: Wait = DEFAULT_WAIT, as_json: AsJson = False) -> None:
    """End a rental and delete all its files."""
    within_s = durations.parse(wait)
    found = ask(lambda orion: orion.find_rental(rental, ended=True))
    if found.state not in ENDED:
        confirm(f"Release {found.name} and delete all its files?", yes)
    if_interrupted = f"if the release of {found.name} has begun, it continues; see: orion show {found.id}"
    with platform(f"releasing {found.name}", if_interrupted) as (orion, tell):
        released = orion.release(found.id, wait_s=min(within_s, MAX_WAIT_S))
        if released.state not in ENDED and within_s > MAX_WAIT_S:
            left_s = within_s - MAX_WAIT_S
            released = orion.wait_for(found.id, RentalState.RELEASED, left_s, lambda one: tell(situation(one)))
    keys.forget(found.id)
    config_ssh.refresh()
    if as_json:
        output.emit(released)
    if released.state not in ENDED:
        raise StillWaiting(f"{situation(released)}. The release continues by itself")
    if not as_json:
        output.say(f"{situation(released)}.")


def situation(rental: Rental) -> str:
    """Return a rental's state and the reason, such as `box is queued: no worker has a free slot`."""
    explanation = rental.explanation.rstrip(".")
    return f"{rental.name} is {rental.state.value}" + (f": {explanation}" if explanation else "")


def notices(rental: Rental) -> list[str]:
    """Return the warnings about a rental's files, one line each, without control characters."""
    found = []
    if rental.copy_problem:
        found.append(_no_snapshot(rental))
    elif rental.home_warning:
        found.append(f"{rental.name}: {rental.home_warning}")
    if rental.salvage:
        lost = "a recovered snapshot of files that it lost with a worker"
        found.append(f"{rental.name} has {lost}: {_recovered(rental)}")
    return [output.plain(one) for one in found]


def _no_snapshot(rental: Rental) -> str:
    return f"no snapshot of {rental.name} can be made: {rental.copy_problem}"


def _recovered(rental: Rental) -> str:
    """Return a recovered snapshot and the command, such as `1-4, 12 kB, of 3 min ago: orion restore lab --from 1-4`."""
    if (one := rental.salvage) is None:
        return ""
    size, age = output.size(one.bytes), output.when(one.at)
    return f"{one.generation}, {size}, of {age}: orion restore {rental.name} --from {one.generation}"


def _row(rental: Rental, with_owner: bool) -> list[str]:
    state = rental.state.value
    if rental.start_end:
        state += f" (start: {rental.start_end.replace('unseen', 'ended')})"
    ends, size = output.when(rental.expires_at), output.size(rental.last_safe_copy_bytes)
    snapshot = output.when(rental.last_safe_copy_at) + ("!" if rental.copy_problem else "")
    cells = [rental.name, rental.id, state, rental.worker_id or "-", ends, snapshot, size]
    return [*cells, rental.owner] if with_owner else cells


def _start_end(rental: Rental) -> str:
    """Return how the start command ended, and the commands that show its output and run it again."""
    kind, _, number = rental.start_end.partition(" ")
    words = {"status": f"ended with status {number}", "signal": f"was ended by signal {number}"}
    how, at, name = words.get(kind, "has ended"), output.when(rental.start_ended_at), rental.name
    return f"{how}, {at}; to see its output: orion logs {name}; to run it again: orion start {name}"


def _show_log(entries: list[LogEntry], as_json: bool) -> None:
    if as_json:
        return output.emit(entries)
    if not entries:
        return output.note("there were no provisioning jobs yet")
    rows = []
    for one in entries:
        outcome, seconds = "done" if one.ok else "failed", f"{one.seconds:.3f}"
        rows.append([output.when(one.at), one.action, one.worker_id, str(one.epoch), outcome, seconds, one.message])
    headings = ["WHEN", "ACTION", "WORKER", "EPOCH", "OUTCOME", "SECONDS", "MESSAGE"]
    return output.table(headings, rows, wide="MESSAGE")


def _details(rental: Rental) -> list[tuple[str, str]]:
    worker = rental.worker_id or "-"
    return [
        ("name", rental.name),
        ("id", rental.id),
        ("owner", rental.owner),
        ("state", rental.state.value),
        ("reason", rental.explanation or "-"),
        ("worker", f"{worker}, migrating to {rental.moving_to}" if rental.moving_to else worker),
        ("epoch", str(rental.epoch)),
        ("user", rental.username),
        ("labels", output.labels(rental.labels)),
        ("time", durations.exact(rental.ttl_s)),
        ("rented", output.when(rental.created_at)),
        ("ends", _end(rental)),
        ("snapshot", _last_snapshot(rental)),
        *([("home", rental.home_warning)] if rental.home_warning else []),
        *([("recovered", _recovered(rental))] if rental.salvage else []),
        *([("public ports", " ".join(map(str, rental.public_ports)))] if rental.public_ports else []),
        *([("start", rental.start), ("start log", f"orion logs {rental.name}")] if rental.start else []),
        *([("start end", _start_end(rental))] if rental.start_end else []),
        *([("start problem", rental.start_problem)] if rental.start_problem else []),
    ]


def _last_snapshot(rental: Rental) -> str:
    last = output.when(rental.last_safe_copy_at, "none")
    if rental.last_safe_copy_bytes is not None:
        last += f", {output.size(rental.last_safe_copy_bytes)}"
    return f"{last}; none can be made now: {rental.copy_problem}" if rental.copy_problem else last


def _labels(written: list[str]) -> dict[str, str]:
    labels = {}
    for text in written:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"a label is KEY=VALUE, not {text!r}")
        labels[key] = value
    return labels
