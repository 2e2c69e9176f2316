"""`orion-rental`: the program by which the manager has a worker make, stop and purge rentals and carry their files.

    orion-rental run|create|certify|lock|unlock|freeze|thaw|purge|inventory  < request.json  > report.json
    orion-rental serve                       < requests, one a line  > answers, one a line (rpc/server.py)
    orion-rental send|salvage|receive        a line of JSON, then the bytes of rsync (snapshots/transfer.py)

A request is about one rental or, as `{"rentals": [request, ...]}`, about several; the report then has one report for
each, under `rentals`, in their order. Exit status: 0 done, 2 the request is not understood, 3 refused, 4 something of a
purged rental is left; of several rentals the highest. The report of a failure has `error` and `code`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from orion.rental_order import COMMANDS, RentalOrder
from orion_worker.records import Report, RequestRefused, check_boot
from orion_worker.rental.commands import Rentals
from orion_worker.rental.host_certificate import read_certificate
from orion_worker.rental.paths import WorkerPaths
from orion_worker.rpc.server import RpcServer
from orion_worker.snapshots import transfer

Answer = tuple[int, Report]
"""An exit status and a report."""


def answer_request(command: str, text: str, rentals: Rentals, now: float) -> Answer:
    """Carry out a command; return its exit status and its report. `now`: Unix time."""
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


def order_from(command: str, payload: object) -> RentalOrder:
    """Return the order in a JSON value. Raise ValueError, in words for a person, if it holds none for this command."""
    order = RentalOrder.from_json(payload, command)
    if order.host_certificate:
        read_certificate(order.host_certificate)
    return order


def _answer_all(command: str, several: list[object], rentals: Rentals, now: float) -> list[Answer]:
    """Carry out the requests one after the other; but one purge of several rentals is done as a whole."""
    names = [one.get("rental_id") if isinstance(one, dict) else None for one in several]
    if command != "purge" or len(set(map(str, names))) < len(names):
        return [_answer_one(command, one, rentals, now) for one in several]
    answers = [_checked(command, one, rentals, now) for one in several]
    reports = iter(rentals.purge([each for each in answers if isinstance(each, RentalOrder)]))
    return [_purged(next(reports)) if isinstance(each, RentalOrder) else each for each in answers]


def _answer_one(command: str, payload: object, rentals: Rentals, now: float) -> Answer:
    commands: dict[str, Callable[[RentalOrder], Report]] = {
        "run": rentals.run,
        "create": rentals.create,
        "certify": rentals.certify,
        "lock": rentals.lock,
        "unlock": rentals.unlock,
        "freeze": rentals.freeze,
        "thaw": rentals.thaw,
    }
    order = _checked(command, payload, rentals, now)
    if not isinstance(order, RentalOrder):
        return order
    if command == "purge":
        return _purged(*rentals.purge([order]))
    try:
        return 0, commands[command](order)
    except RequestRefused as refusal:
        return _refused(refusal)


def _checked(command: str, payload: object, rentals: Rentals, now: float) -> RentalOrder | Answer:
    """Return the order in the payload, or the exit status and report that refuse it."""
    try:
        order = order_from(command, payload)
        if order.deadline is not None and now > order.deadline:
            raise RequestRefused("deadline_passed", "its deadline has passed: the manager no longer waits for it")
        check_boot(order.boot_id, rentals.launcher.boot_id)
    except ValueError as error:
        return _not_understood(error)
    except RequestRefused as refusal:
        return _refused(refusal)
    return order


def _purged(report: Report | RequestRefused) -> Answer:
    if isinstance(report, RequestRefused):
        return _refused(report)
    if report["left"]:
        return 4, {**report, "error": "something of the rental is left on the worker", "code": "left_behind"}
    return 0, report


def _refused(refusal: RequestRefused) -> Answer:
    return 3, {"changed": False, "error": str(refusal), "code": refusal.code}


def _not_understood(reason: object) -> Answer:
    return 2, {"changed": False, "error": f"request not understood: {reason}", "code": "invalid_request"}


def main() -> int:
    names = (*COMMANDS, "inventory", "serve", *transfer.TRANSFERS)
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        print(f"usage: orion-rental {'|'.join(names)} < request.json", file=sys.stderr)  # noqa: T201
        return 2
    command = sys.argv[1]
    if command == "serve":
        RpcServer(_answer_now, COMMANDS, _transfer).run()
        return 0
    if command in transfer.TRANSFERS:
        return _transfer(command)
    status, report = _answer_now(command, "" if command == "inventory" else sys.stdin.read())
    print(json.dumps(report))  # noqa: T201 - the report is the program's output
    return status


def _answer_now(command: str, text: str) -> Answer:
    return answer_request(command, text, Rentals(), time.time())


def _transfer(direction: str) -> int:
    paths = WorkerPaths()
    return transfer.run_transfer(direction, Rentals(paths), paths.staging, paths.homes)
