"""Cli"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orion.rental_order import COMMANDS, RentalOrder
from orion_worker.records import RequestRefused, check_boot
from orion_worker.rental.commands import Rentals
from orion_worker.rental.paths import WorkerPaths
from orion_worker.rental.requests import Report, request_from
from orion_worker.rpc import server
from orion_worker.snapshots import transfer


def answer_request(command: str, text: str, rentals: Rentals, now: float) -> tuple[int, Report]:
    """Exit status and report of one call. `now`: Unix time."""
    if command == "inventory":
        return 0, {"changed": False, "rentals": rentals.inventory()}
    try:
        payload = json.loads(text)
    except ValueError as error:
        return _not_understood(error)
    if not (isinstance(payload, dict) and "rentals" in payload):
        return _answer_one(command, payload, rentals, now)
    several = payload["rentals"]
    if not (isinstance(several, list) and several and len(payload) == 1):
        return _not_understood("rentals must be a list of requests, and alone")
    answers = _answer_all(command, several, rentals, now)
    reports = [report for _, report in answers]
    whole: Report = {"changed": any(report["changed"] for report in reports), "rentals": reports}
    first = next((report for status, report in answers if status), None)
    failure = {"error": first["error"], "code": first["code"]} if first else {}
    return max(status for status, _ in answers), whole | failure


def _answer_all(command: str, several: list[object], rentals: Rentals, now: float) -> list[tuple[int, Report]]:
    """One after the other, but a purge of several is one."""
    names = [one.get("rental_id") if isinstance(one, dict) else None for one in several]
    if command != "purge" or len(set(map(str, names))) < len(names):
        return [_answer_one(command, one, rentals, now) for one in several]
    answers = [_request(command, one, rentals, now) for one in several]
    reports = iter(rentals.purge([each for each in answers if isinstance(each, RentalOrder)]))
    return [_purged(next(reports)) if isinstance(each, RentalOrder) else each for each in answers]


def _answer_one(command: str, payload: object, rentals: Rentals, now: float) -> tuple[int, Report]:
    commands: dict[str, Callable[[RentalOrder], Report]] = {
        "run": rentals.run,
        "create": rentals.create,
        "certify": rentals.certify,
        "lock": rentals.lock,
        "unlock": rentals.unlock,
        "freeze": rentals.freeze,
        "thaw": rentals.thaw,
    }
    request = _request(command, payload, rentals, now)
    if not isinstance(request, RentalOrder):
        return request
    if command == "purge":
        return _purged(*rentals.purge([request]))
    try:
        return 0, commands[command](request)
    except RequestRefused as refusal:
        return _refused(refusal)


def _request(command: str, payload: object, rentals: Rentals, now: float) -> RentalOrder | tuple[int, Report]:
    """Return the order in the payload, or the exit status and report that refuse it."""
    try:
        request = request_from(command, payload)
    except ValueError as error:
        return _not_understood(error)
    if request.deadline is not None and now > request.deadline:
        late = RequestRefused("deadline_passed", "its deadline has passed: the manager no longer waits for it")
        return _refused(late)
    try:
        check_boot(request.boot_id, rentals.launcher.boot_id)
    except RequestRefused as refusal:
        return _refused(refusal)
    return request


def _purged(report: Report | RequestRefused) -> tuple[int, Report]:
    if isinstance(report, RequestRefused):
        return _refused(report)
    if report["left"]:
        return 4, {**report, "error": "something of the rental is left on the worker", "code": "left_behind"}
    return 0, report


def _refused(refusal: RequestRefused) -> tuple[int, Report]:
    return 3, {"changed": False, "error": str(refusal), "code": refusal.code}


def _not_understood(reason: object) -> tuple[int, Report]:
    return 2, {"changed": False, "error": f"request not understood: {reason}", "code": "invalid_request"}


def main() -> int:
    names = (*COMMANDS, "inventory", "serve", *transfer.TRANSFERS)
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        print(f"usage: orion-rental {'|'.join(names)} < request.json", file=sys.stderr)  # noqa: T201
        return 2
    command = sys.argv[1]
    if command == "serve":
        transfers = server.TransferHandler(Path(server.SOCKET_PATH), _carry_now)
        server.serve(_answer_now, COMMANDS, sys.stdin.fileno(), sys.stdout.fileno(), transfers)
        return 0
    if command in transfer.TRANSFERS:
        return _carry_now(command)
    text = "" if command == "inventory" else sys.stdin.read()
    status, report = _answer_now(command, text)
    print(json.dumps(report))  # noqa: T201 - the report is the program's output
    return status


def _answer_now(command: str, text: str) -> tuple[int, Report]:
    return answer_request(command, text, Rentals(), time.time())


def _carry_now(direction: str) -> int:
    paths = WorkerPaths()
    return transfer.run_transfer(direction, Rentals(paths), paths.staging, paths.homes)
