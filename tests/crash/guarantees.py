"""The guarantees that must hold when the platform has settled after a crash. Each function lists their violations."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise

from crash.environment import CrashEnvironment

from orion.manager.domain.states import ENDED, TABLES, RentalState
from orion.manager.domain.steps import _RENTAL_EVENTS

FINAL_STATES = {
    "rental": {"active", *ENDED},
    "placement": {"running", "purged"},
}
RENTAL_STATES = {kind: state for state, kind in _RENTAL_EVENTS.items()}
_FAULTS = re.compile(r"round failed|request failed|task failed\".*exc|Traceback|loop .* failed", re.IGNORECASE)


def violations(environment: CrashEnvironment, expected: Mapping[str, str]) -> list[str]:
    """Return all violations, none if the platform has settled and every guarantee holds.

    `expected`: the final state of each rental that was requested, by name.
    """
    try:
        return [
            *_nothing_is_lost_or_doubled(environment, expected),
            *_each_active_rental_has_one_account(environment),
            *_no_account_is_orphaned(environment),
            *_all_is_at_rest(environment),
            *_numbers_are_given_once(environment),
            *_each_change_is_in_its_table_and_has_its_event(environment),
            *_each_worker_is_known_once_and_ready(environment),
            *_the_manager_made_no_mistake(environment),
        ]
    except sqlite3.OperationalError as error:
        return [f"the database cannot be read at present: {error}"]


def _nothing_is_lost_or_doubled(environment: CrashEnvironment, expected: Mapping[str, str]) -> list[str]:
    found = [(row["name"], row["state"]) for row in environment.rows("SELECT name, state FROM rentals")]
    return [] if sorted(found) == sorted(expected.items()) else [f"rentals are {found}, not {dict(expected)}"]


def _each_active_rental_has_one_account(environment: CrashEnvironment) -> list[str]:
    wrong = []
    for rental in environment.rows("SELECT * FROM rentals WHERE state = 'active'"):
        where = [
            (a.worker_id, a.node.accounts[rental["id"]]) for a in environment.agents if rental["id"] in a.node.accounts
        ]
        live = environment.rows(
            f"SELECT * FROM placements WHERE rental_id = '{rental['id']}' AND state = 'running'"  # noqa: S608
        )
        if len(where) != 1 or len(live) != 1:
            wrong.append(f"{rental['name']} has {len(where)} accounts and {len(live)} running placements")
            continue
        (worker_id, account), placement = where[0], live[0]
        known = (placement["worker_id"], placement["epoch"], rental["username"], rental["uid"])
        if known != (worker_id, account.epoch, account.username, account.uid):
            wrong.append(f"{rental['name']} is {known} in the database, and {account} on {worker_id}")
        if not account.unlocked:
            wrong.append(f"{rental['name']} is locked")
        if account.keys != (rental["public_key"],) or placement["public_key"] != rental["public_key"]:
            wrong.append(f"{rental['name']} does not have the last key")
    return wrong


def _no_account_is_orphaned(environment: CrashEnvironment) -> list[str]:
    active = {row["id"] for row in environment.rows("SELECT id FROM rentals WHERE state = 'active'")}
    return [f"{a.worker_id} still has {r}" for a in environment.agents for r in a.node.accounts if r not in active]


def _all_is_at_rest(environment: CrashEnvironment) -> list[str]:
    return [
        f"{kind} {row['id']} is still {row['state']}"
        for kind, states in FINAL_STATES.items()
        for row in environment.rows(f"SELECT id, state FROM {kind}s")  # noqa: S608
        if row["state"] not in states
    ]


def _numbers_are_given_once(environment: CrashEnvironment) -> list[str]:
    """Return uids that several rentals have, in the database or on workers, and epochs that were reserved twice."""
    owners: dict[int, set[str]] = defaultdict(set)
    for rental in environment.rows("SELECT id, uid FROM rentals"):
        owners[rental["uid"]].add(rental["id"])
    for agent in environment.agents:
        for rental_id, account in agent.node.accounts.items():
            owners[account.uid].add(rental_id)
    wrong = [f"uid {uid} belongs to {sorted(ids)}" for uid, ids in owners.items() if len(ids) > 1]
    reserved = Counter(
        (e["rental_id"], e["epoch"]) for e in environment.rows("SELECT * FROM events WHERE kind = 'placement.reserved'")
    )
    wrong += [f"epoch {which} was reserved {times} times" for which, times in reserved.items() if times > 1]
    return wrong


def _each_change_is_in_its_table_and_has_its_event(environment: CrashEnvironment) -> list[str]:
    recorded: dict[tuple[str, str], list[str]] = defaultdict(list)
    for event in environment.rows("SELECT * FROM events ORDER BY id"):
        kind, _, what = event["kind"].partition(".")
        if event["kind"] in RENTAL_STATES:
            recorded["rental", event["rental_id"]].append(RENTAL_STATES[event["kind"]])
        elif kind == "placement":
            recorded["placement", f"{event['rental_id']}/{event['epoch']}"].append(what)
        elif kind == "worker" and what.startswith("became_"):
            recorded["worker", event["worker_id"]].append(what.removeprefix("became_"))
    now = {("rental", row["id"]): row["state"] for row in environment.rows("SELECT id, state FROM rentals")}
    for row in environment.rows("SELECT * FROM placements"):
        now["placement", f"{row['rental_id']}/{row['epoch']}"] = row["state"]
    for row in environment.rows("SELECT id, health FROM workers"):
        now["worker", row["id"]] = row["health"]
    return [wrong for key, state in now.items() for wrong in _violations_of_history(key, recorded[key], state)]


def _violations_of_history(key: tuple[str, str], recorded: list[str], state: str) -> list[str]:
    kind, identity = key
    path = ["joining", *recorded] if kind == "worker" else recorded
    steps = pairwise(path)
    wrong = [f"{kind} {identity} went from {a} to {b}" for a, b in steps if b not in TABLES[kind][a].exits]
    if not path or path[-1] != state:
        wrong.append(f"{kind} {identity} is {state}, but its events say {path}")
    return wrong


def _each_worker_is_known_once_and_ready(environment: CrashEnvironment) -> list[str]:
    known = {row["id"]: row["health"] for row in environment.rows("SELECT id, health FROM workers")}
    meant = {agent.worker_id: "ready" for agent in environment.agents}
    return [] if known == meant else [f"workers are {known}, not {meant}"]


def _the_manager_made_no_mistake(environment: CrashEnvironment) -> list[str]:
    wrong = [f"the manager exited with status {status}" for status in environment.exits if status != -9]
    for line in environment.log().splitlines():
        if "exception" in line or _FAULTS.search(line):
            entry = json.loads(line) if line.startswith("{") else {"event": line}
            wrong.append(f"in the manager's log: {entry.get('event')}: {str(entry.get('exception', ''))[-600:]}")
    return wrong


assert set(RENTAL_STATES.values()) == set(RentalState)
