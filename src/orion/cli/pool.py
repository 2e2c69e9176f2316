"""The operators' commands: workers, drain, resume, remove, inventory and status."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Iterable
from itertools import count
from typing import Annotated, Any

from typer import Context, Option, Typer

from orion.cli import durations, output
from orion.cli.session import AsJson, WorkerName, Yes, ask, confirm, platform
from orion.errors import Ended, NotFound, StillWaiting
from orion.ssh_command import pinned_host_arguments
from orion.wire import NOT_MOVED, Worker, WorkerHealth, WorkerIntent, one_public_key

RENTALS_EVERY = 10  # requests for a worker for each request for its rentals, of which there may be thousands
_WORKER_ID = re.compile(r"[a-z0-9-]{1,64}")

commands = Typer(invoke_without_command=True)


@commands.callback()
def workers(context: Context, as_json: AsJson = False) -> None:
    """List the workers of the pool."""
    if context.invoked_subcommand is not None:
        return None
    found = ask(lambda orion: list(orion.workers()))
    if as_json:
        return output.emit(found)
    if not found:
        return output.note("no worker has joined yet. To start some, run: WORKERS=3 make up")
    headings = ["ID", "HOSTNAME", "HEALTH", "FREE", "LOAD", "HEARTBEAT", "LABELS"]
    output.table(headings, [_row(one) for one in found], wide="LABELS")
    for one in found:
        if one.explanation and one.health is not WorkerHealth.READY:
            output.say(output.plain(f"{one.id}: {one.explanation}"))
    return None


@commands.command()
def prune(as_json: AsJson = False) -> None:
    """Forget workers that are down.

    A worker that may have the only copy of a rental's files is kept. The others are forgotten after an hour anyway.
    """
    done = ask(lambda orion: orion.prune_workers())
    kept = [f"Kept: {one.id}: {one.why}" for one in done.kept]
    output.result(done, as_json, f"Forgotten: {', '.join(done.forgotten) or 'none'}.", *kept)


@commands.command()
def gone(worker: WorkerName, yes: Yes = False, as_json: AsJson = False) -> None:
    """Declare that a worker's container is gone.

    Its rentals are then taken over at once.
    """
    found = ask(lambda orion: orion.find_worker(worker))
    warning = "if it only lost its network, its rentals run twice until its lease ends"
    confirm(f"Is the container of {found.id} ({found.hostname}) really removed or stopped? ({warning})", yes)
    declared = ask(lambda orion: orion.declare_gone(found.id))
    text = f"{found.id} is down; its rentals continue elsewhere. To watch them, run: orion events -f"
    output.result(declared, as_json, text)


def drain(
    worker: WorkerName,
    no_wait: Annotated[bool, Option("--no-wait", help="Do not wait until it is drained.")] = False,
    as_json: AsJson = False,
) -> None:
    """Migrate all rentals away from a worker.

    They keep all their files. The worker gets no new rentals until it is resumed.
    """
    drained = ask(lambda orion: orion.drain(orion.find_worker(worker).id))
    if not no_wait:
        drained = _wait_until_drained(drained)
    if drained.intent is WorkerIntent.ACTIVE and not as_json:
        raise Ended(f"{drained.id} is not being drained any more: somebody resumed it")
    more = "" if drained.intent is WorkerIntent.DRAINED else "; the drain continues, see: orion workers"
    output.result(drained, as_json, f"{drained.id} is {drained.intent.value}{more}.")


def _wait_until_drained(worker: Worker) -> Worker:
    """Wait until the worker is drained. Print each new reason for waiting once."""
    printed: set[str] = set()
    requests = count()

    def note(text: str) -> None:
        if text not in printed:
            printed.add(text)
            output.note(output.plain(text))

    if_interrupted = f"the drain of {worker.id} continues; to end it, run: orion resume {worker.id}"
    with platform(f"draining {worker.id}", if_interrupted) as (orion, tell):

        def changed(now: Worker) -> None:
            tell(f"draining {now.id}: {now.explanation or 'cleaning up'}")
            note(f"{now.id}: {now.explanation or 'its rentals have left; cleaning up'}")
            is_turn_of_rentals = next(requests) % RENTALS_EVERY == 0
            for rental in orion.rentals() if now.explanation and is_turn_of_rentals else ():
                if rental.worker_id == now.id and rental.explanation.startswith(NOT_MOVED):
                    note(f"{rental.name}: {rental.explanation}")

        return orion.wait_until_drained(worker.id, changed)


def resume(
    worker: WorkerName,
    give_up: Annotated[
        bool, Option("--give-up", help="Also delete rentals that only it knows, with all files.")
    ] = False,
    wait: Annotated[str, Option(metavar="DURATION", help="How long to wait until it is ready; 0: not at all.")] = "30s",
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Let a worker take rentals again.

    Use this after a drain or a quarantine. The platform first checks the worker, which takes some seconds.
    """
    within_s = durations.parse(wait)
    found = ask(lambda orion: orion.find_worker(worker))
    if give_up:
        confirm(f"Delete the rentals on {found.id} that the database does not know, with all their files?", yes)
    resumed = ask(lambda orion: orion.resume(found.id, give_up=give_up))
    if_interrupted = f"{found.id} is resumed, and its check continues; see: orion workers"
    with platform(f"waiting until {found.id} is ready", if_interrupted) as (orion, tell):
        resumed = orion.wait_until_ready(resumed, within_s, lambda one: tell(_situation(one)))
    if as_json:
        output.emit(resumed)
    if resumed.health is not WorkerHealth.READY:
        raise StillWaiting(f"{_situation(resumed)}. It is resumed, and its check continues; see: orion workers")
    if not as_json:
        output.say(f"{output.plain(resumed.id)} is {_health(resumed)}.")


def _situation(worker: Worker) -> str:
    """Return a worker's state and the reason, such as `w-aaaa2222 is joining: not checked yet`."""
    explanation = worker.explanation.rstrip(".")
    return f"{worker.id} is {_health(worker)}" + (f": {explanation}" if explanation else "")


def remove(worker: WorkerName, yes: Yes = False, as_json: AsJson = False) -> None:
    """Forget a worker that will not come back."""
    found = ask(lambda orion: orion.find_worker(worker))
    confirm(f"Forget {found.id} ({found.hostname}, {found.health.value})?", yes)
    ask(lambda orion: orion.remove_worker(found.id))
    output.result({"removed": found.id}, as_json, f"{found.id} is forgotten.")


def status(as_json: AsJson = False) -> None:
    """Show the state of the platform."""
    found = ask(lambda orion: orion.status())
    if as_json:
        return output.emit(found)
    shown = [
        ("version", found.version),
        ("workers", _counts(found.workers)),
        ("rentals", _counts(found.rentals)),
        ("slots", f"{found.slots_free} free of {found.slots}"),
        ("brake", found.brake or "off"),
        *([("clock", found.clock)] if found.clock else []),
        ("snapshots", f"paused: {found.copies_paused}" if found.copies_paused else "on"),
    ]
    output.fields(shown)
    for late in found.overdue:
        since = f"{late.state} for {durations.rough(late.since_s)}"
        output.say(output.plain(f"{late.kind} {late.name} ({late.id}) {since}: {late.why}"))
        output.say(output.plain(f"  {late.what_to_do}"))
    return None


def inventory(
    list_all: Annotated[bool, Option("--list", help="Print all hosts; the default.")] = False,
    host: Annotated[str | None, Option(help="Print the variables of one host.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the workers for ansible-playbook -i."""
    del list_all, as_json  # the options of an inventory program; the output is JSON in any case
    hosts = ask(lambda orion: ansible_hosts(orion.workers()))
    if host is None:
        return output.emit({"workers": {"hosts": sorted(hosts)}, "_meta": {"hostvars": hosts}})
    if host not in hosts:
        raise NotFound(404, "not_found", f"there is no worker {host!r}, or it is down")
    return output.emit(hosts[host])


def ansible_hosts(workers: Iterable[Worker]) -> dict[str, dict[str, Any]]:
    """Return the variables of each worker that is not down. Leave out those whose values ssh could run as commands."""
    return {one.id: _ansible_variables(one) for one in workers if one.health is not WorkerHealth.DOWN and _is_safe(one)}


def _ansible_variables(worker: Worker) -> dict[str, Any]:
    return {
        "ansible_host": worker.address,
        "ansible_port": 22,
        "ansible_user": "root",
        "ansible_ssh_common_args": shlex.join(pinned_host_arguments(worker.id, worker.ssh_host_keys)),
        "orion_hostname": worker.hostname,
        "orion_health": worker.health.value,
    }


def _is_safe(worker: Worker) -> bool:
    try:
        ipaddress.ip_address(worker.address)
        keys = [one_public_key(key) for key in worker.ssh_host_keys]
    except ValueError:
        return False
    return bool(keys and _WORKER_ID.fullmatch(worker.id))


def _row(worker: Worker) -> list[str]:
    free = f"{worker.slots_free}/{worker.slots}"
    load = f"{worker.load.cpu:.1f} cpu {worker.load.memory_used_bytes >> 20} MiB"
    heartbeat, labels = output.when(worker.last_heartbeat_at), output.labels(worker.labels)
    return [worker.id, worker.hostname, _health(worker), free, load, heartbeat, labels]


def _health(worker: Worker) -> str:
    if worker.intent is WorkerIntent.ACTIVE:
        return worker.health.value
    return f"{worker.health.value}, {worker.intent.value}"


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items()) if number) or "none"
