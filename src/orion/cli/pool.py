"""workers, drain, resume, remove, inventory, status: for those who run the platform."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Iterable
from itertools import count
from typing import Annotated, Any

import typer

from orion.cli import durations, output
from orion.cli.durations import rough
from orion.cli.session import AsJson, WorkerName, Yes, confirm, platform
from orion.errors import AlreadyEnded, NotFound, StillWaiting
from orion.ssh import pinned_host_arguments
from orion.wire import NOT_MOVED, Worker, WorkerHealth, WorkerIntent, one_public_key

DEFAULT_RESUME_WAIT = "30s"
LOOK_AT_RENTALS = 10
"""Every so many looks at the worker: there may be thousands of them."""
_WORKER_ID = re.compile(r"[a-z0-9-]{1,64}")


commands = typer.Typer(invoke_without_command=True)


@commands.callback()
def workers(context: typer.Context, as_json: AsJson = False) -> None:
    """List the workers of the pool."""
    if context.invoked_subcommand is not None:
        return None
    with platform() as (orion, _tell):
        found = list(orion.workers())
    if as_json:
        return output.emit(found)
    if not found:
        return output.note("no worker has called home yet; start some with: WORKERS=3 make up")
    output.table(
        ["ID", "HOSTNAME", "HEALTH", "FREE", "LOAD", "HEARTBEAT", "LABELS"], [_row(one) for one in found], wide="LABELS"
    )
    for one in found:
        if one.explanation and one.health is not WorkerHealth.READY:
            output.say(f"{output.plain(one.id)}: {output.plain(one.explanation)}")
    return None


@commands.command()
def prune(as_json: AsJson = False) -> None:
    """Forget the workers that are down and of which nothing is missing; an hour later that happens by itself."""
    with platform() as (orion, _tell):
        done = orion.prune_workers()
    if as_json:
        return output.emit(done)
    output.say(f"Forgotten: {output.plain(', '.join(done.forgotten)) or 'none'}.")
    for one in done.kept:
        output.say(output.plain(f"Kept: {one.id}: {one.why}"))
    return None


@commands.command()
def gone(worker: WorkerName, yes: Yes = False, as_json: AsJson = False) -> None:
    """Say that a worker's container is not there any more, so that what ran there is taken over at once."""
    with platform() as (orion, _tell):
        found = orion.find_worker(worker)
    what = "one that only lost its network runs on beside what is taken over, until its lease has passed"
    confirm(f"Is the container of {found.id} ({found.hostname}) really removed, or stopped? ({what})", yes)
    with platform() as (orion, _tell):
        declared = orion.declare_gone(found.id)
    if as_json:
        return output.emit(declared)
    return output.say(f"{output.plain(found.id)} is given up; its rentals go on elsewhere: orion events -f")


def drain(
    worker: WorkerName,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until it is drained.")] = False,
    as_json: AsJson = False,
) -> None:
    """Move all rentals away from a worker.

    They keep all their files, and nothing new is placed on the worker until it is resumed.
    """
    with platform() as (orion, _tell):
        drained = orion.drain(orion.find_worker(worker).id)
    if not no_wait:
        drained = _wait_until_drained(drained)
    if as_json:
        return output.emit(drained)
    if drained.intent is WorkerIntent.ACTIVE:
        raise AlreadyEnded(f"{drained.id} is not being drained any more: somebody resumed it")
    more = "" if drained.intent is WorkerIntent.DRAINED else "; it goes on by itself, see: orion workers"
    return output.say(f"{output.plain(drained.id)} is {drained.intent.value}{more}.")


def _wait_until_drained(worker: Worker) -> Worker:
    """Tells what it waits for, each time that this is something else."""
    told: set[str] = set()
    looks = count()

    def note(text: str) -> None:
        if text not in told:
            told.add(text)
            output.note(output.plain(text))

    goes_on = f"the drain of {worker.id} goes on by itself; orion resume {worker.id} ends it"
    with platform(f"draining {worker.id}", goes_on) as (orion, tell):

        def changed(now: Worker) -> None:
            tell(f"draining {now.id}: {now.explanation or 'cleaning up'}")
            note(f"{now.id}: {now.explanation or 'its rentals are away; cleaning up'}")
            asked = next(looks) % LOOK_AT_RENTALS == 0
            for rental in orion.rentals() if now.explanation and asked else ():
                if rental.worker_id == now.id and rental.explanation.startswith(NOT_MOVED):
                    note(f"{rental.name}: {rental.explanation}")

        return orion.wait_until_drained(worker.id, changed)


def resume(
    worker: WorkerName,
    give_up: Annotated[
        bool,
        typer.Option("--give-up", help="Also end, files and all, the rentals on it that the database does not know."),
    ] = False,
    wait: Annotated[
        str, typer.Option(metavar="DURATION", help="How long to wait until it is ready at most; 0 does not wait.")
    ] = DEFAULT_RESUME_WAIT,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Let a worker take rentals again.

    It was drained or quarantined. It is checked first, which takes some seconds.
    """
    within_s = durations.parse(wait)
    with platform() as (orion, _tell):
        found = orion.find_worker(worker)
    if give_up:
        confirm(f"End for good, files and all, what {found.id} holds and the database does not know?", yes)
    with platform() as (orion, _tell):
        resumed = orion.resume(found.id, give_up=give_up)
    goes_on = f"{found.id} is resumed, and checked by itself; see: orion workers"
    with platform(f"waiting until {found.id} is ready", goes_on) as (orion, tell):
        resumed = orion.wait_until_ready(resumed, within_s, lambda one: tell(_situation(one)))
    if as_json:
        output.emit(resumed)
    if resumed.health is not WorkerHealth.READY:
        raise StillWaiting(f"{_situation(resumed)}. It was resumed, and is checked by itself; see: orion workers")
    if not as_json:
        output.say(f"{output.plain(resumed.id)} is {_health(resumed)}.")


def _situation(worker: Worker) -> str:
    """`w-aaaa2222 is joining: not checked yet`"""
    explanation = worker.explanation.rstrip(".")
    return f"{worker.id} is {_health(worker)}" + (f": {explanation}" if explanation else "")


def remove(worker: WorkerName, yes: Yes = False, as_json: AsJson = False) -> None:
    """Forget a worker that will not come back."""
    with platform() as (orion, _tell):
        found = orion.find_worker(worker)
    confirm(f"Forget {found.id} ({found.hostname}, {found.health.value})?", yes)
    with platform() as (orion, _tell):
        orion.remove_worker(found.id)
    if as_json:
        return output.emit({"removed": found.id})
    return output.say(f"{output.plain(found.id)} is forgotten.")


def status(as_json: AsJson = False) -> None:
    """Show how the platform is."""
    with platform() as (orion, _tell):
        found = orion.status()
    if as_json:
        return output.emit(found)
    output.fields(
        [
            ("version", found.version),
            ("workers", _counts(found.workers)),
            ("rentals", _counts(found.rentals)),
            ("slots", f"{found.slots_free} free of {found.slots}"),
            ("brake", found.brake or "off"),
            *([("clock", found.clock)] if found.clock else []),
            ("copies", f"paused: {found.copies_paused}" if found.copies_paused else "on"),
        ]
    )
    for late in found.overdue:
        output.say(
            output.plain(f"{late.kind} {late.name} ({late.id}) {late.state} for {rough(late.since_s)}: {late.why}")
        )
        output.say(f"  {output.plain(late.what_to_do)}")
    return None


def inventory(
    list_all: Annotated[bool, typer.Option("--list", help="All hosts; the default.")] = False,
    host: Annotated[str | None, typer.Option(help="The variables of one host.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the workers for ansible-playbook -i."""
    del list_all, as_json  # there is nothing else that this could print
    with platform() as (orion, _tell):
        hosts = ansible_hosts(orion.workers())
    if host is None:
        return output.emit({"workers": {"hosts": sorted(hosts)}, "_meta": {"hostvars": hosts}})
    if host not in hosts:
        raise NotFound(404, "not_found", f"there is no worker {host!r} that is not down")
    return output.emit(hosts[host])


def ansible_hosts(workers: Iterable[Worker]) -> dict[str, dict[str, Any]]:
    """The variables of each worker that is not down. One whose values ssh might obey as commands is left out."""
    return {one.id: _ansible_variables(one) for one in workers if one.health is not WorkerHealth.DOWN and _safe(one)}


def _ansible_variables(worker: Worker) -> dict[str, Any]:
    return {
        "ansible_host": worker.address,
        "ansible_port": 22,
        "ansible_user": "root",
        "ansible_ssh_common_args": shlex.join(pinned_host_arguments(worker.id, worker.ssh_host_keys)),
        "orion_hostname": worker.hostname,
        "orion_health": worker.health.value,
    }


def _safe(worker: Worker) -> bool:
    try:
        ipaddress.ip_address(worker.address)
        keys = [one_public_key(key) for key in worker.ssh_host_keys]
    except ValueError:
        return False
    return bool(keys and _WORKER_ID.fullmatch(worker.id))


def _row(worker: Worker) -> list[str]:
    return [
        worker.id,
        worker.hostname,
        _health(worker),
        f"{worker.slots_free}/{worker.slots}",
        f"{worker.load.cpu:.1f} cpu {worker.load.memory_used_bytes >> 20} MiB",
        output.when(worker.last_heartbeat_at),
        output.labels(worker.labels),
    ]


def _health(worker: Worker) -> str:
    if worker.intent is WorkerIntent.ACTIVE:
        return worker.health.value
    return f"{worker.health.value}, {worker.intent.value}"


def _counts(of: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(of.items()) if number) or "none"
