"""What must be true when all is at rest, whatever was killed before: each function lists what is wrong."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise

from crash.stage import Stage

from orion.manager.domain.states import ENDED, TABLES, RentalState
from orion.manager.domain.steps import _RENTAL_EVENTS

RESTFUL = {
    "rental": {"active", *ENDED},
    "placement": {"running", "purged"},
}
RENTAL_STATES = {kind: state for state, kind in _RENTAL_EVENTS.items()}
_FAULTS = re.compile(r"round failed|request failed|task failed\".*exc|Traceback|loop .* failed", re.IGNORECASE)


def broken(stage: Stage, expected: Mapping[str, str]) -> list[str]:
    """All that is wrong now; nothing when it has come to rest and every promise was kept.

    `expected`: the state in which each rental that was asked for must have ended, by name.
    """
    try:
        return [
            *_nothing_is_lost_or_doubled(stage, expected),
            *_each_active_rental_has_one_account(stage),
            *_no_account_is_orphaned(stage),
            *_all_is_at_rest(stage),
            *_numbers_are_given_once(stage),
            *_each_change_is_in_its_table_and_has_its_event(stage),
            *_each_worker_is_known_once_and_ready(stage),
            *_the_manager_made_no_mistake(stage),
        ]
    except sqlite3.OperationalError as error:
        return [f"the database cannot be read just now: {error}"]


def _nothing_is_lost_or_doubled(stage: Stage, expected: Mapping[str, str]) -> list[str]:
    found = [(row["name"], row["state"]) for row in stage.rows("SELECT name, state FROM rentals")]
    return [] if sorted(found) == sorted(expected.items()) else [f"rentals are {found}, not {dict(expected)}"]


def _each_active_rental_has_one_account(stage: Stage) -> list[str]:
    wrong = []
    for rental in stage.rows("SELECT * FROM rentals WHERE state = 'active'"):
        where = [(a.worker_id, a.node.accounts[rental["id"]]) for a in stage.agents if rental["id"] in a.node.accounts]
        live = stage.rows(
            f"SELECT * FROM placements WHERE rental_id = '{rental['id']}' AND state = 'running'"  # noqa: S608
        )
        if len(where) != 1 or len(live) != 1:
            wrong.append(f"{rental['name']} has {len(where)} accounts and {len(live)} running placements")
            continue
        (worker_id, account), placement = where[0], live[0]
        belief = (placement["worker_id"], placement["epoch"], rental["username"], rental["uid"])
        if belief != (worker_id, account.epoch, account.username, account.uid):
            wrong.append(f"{rental['name']} is believed to be {belief}, and is {account} on {worker_id}")
        if not account.unlocked:
            wrong.append(f"{rental['name']} is locked")
        if account.keys != (rental["public_key"],) or placement["public_key"] != rental["public_key"]:
            wrong.append(f"{rental['name']} has not the last key")
    return wrong


def _no_account_is_orphaned(stage: Stage) -> list[str]:
    active = {row["id"] for row in stage.rows("SELECT id FROM rentals WHERE state = 'active'")}
    return [f"{a.worker_id} still has {r}" for a in stage.agents for r in a.node.accounts if r not in active]


def _all_is_at_rest(stage: Stage) -> list[str]:
    return [
        f"{kind} {row['id']} is still {row['state']}"
        for kind, states in RESTFUL.items()
        for row in stage.rows(f"SELECT id, state FROM {kind}s")  # noqa: S608
        if row["state"] not in states
    ]


def _numbers_are_given_once(stage: Stage) -> list[str]:
    """Uids over all that ever was, on workers too; epochs rise by one event each."""
    owners: dict[int, set[str]] = defaultdict(set)
    for rental in stage.rows("SELECT id, uid FROM rentals"):
        owners[rental["uid"]].add(rental["id"])
    for agent in stage.agents:
        for rental_id, account in agent.node.accounts.items():
            owners[account.uid].add(rental_id)
    wrong = [f"uid {uid} is of {sorted(ids)}" for uid, ids in owners.items() if len(ids) > 1]
    reserved = Counter(
        (e["rental_id"], e["epoch"]) for e in stage.rows("SELECT * FROM events WHERE kind = 'placement.reserved'")
    )
    wrong += [f"epoch {which} was given {times} times" for which, times in reserved.items() if times > 1]
    return wrong


def _each_change_is_in_its_table_and_has_its_event(stage: Stage) -> list[str]:
    told: dict[tuple[str, str], list[str]] = defaultdict(list)
    for event in stage.rows("SELECT * FROM events ORDER BY id"):
        kind, _, what = event["kind"].partition(".")
        if event["kind"] in RENTAL_STATES:
            told["rental", event["rental_id"]].append(RENTAL_STATES[event["kind"]])
        elif kind == "placement":
            told["placement", f"{event['rental_id']}/{event['epoch']}"].append(what)
        elif kind == "worker" and what.startswith("became_"):
            told["worker", event["worker_id"]].append(what.removeprefix("became_"))
    now = {("rental", row["id"]): row["state"] for row in stage.rows("SELECT id, state FROM rentals")}
    for row in stage.rows("SELECT * FROM placements"):
        now["placement", f"{row['rental_id']}/{row['epoch']}"] = row["state"]
    for row in stage.rows("SELECT id, health FROM workers"):
        now["worker", row["id"]] = row["health"]
    return [wrong for key, state in now.items() for wrong in _story(key, told[key], state)]


def _story(key: tuple[str, str], told: list[str], state: str) -> list[str]:
    kind, identity = key
    path = ["joining", *told] if kind == "worker" else told
    steps = pairwise(path)
    wrong = [f"{kind} {identity} went from {a} to {b}" for a, b in steps if b not in TABLES[kind][a].exits]
    if not path or path[-1] != state:
        wrong.append(f"{kind} {identity} is {state}, but its events say {path}")
    return wrong


def _each_worker_is_known_once_and_ready(stage: Stage) -> list[str]:
    known = {row["id"]: row["health"] for row in stage.rows("SELECT id, health FROM workers")}
    meant = {agent.worker_id: "ready" for agent in stage.agents}
    return [] if known == meant else [f"workers are {known}, not {meant}"]


def _the_manager_made_no_mistake(stage: Stage) -> list[str]:
    wrong = [f"the manager ended by itself with status {status}" for status in stage.exits if status != -9]
    for line in stage.log().splitlines():
        if "exception" in line or _FAULTS.search(line):
            with_story = json.loads(line) if line.startswith("{") else {"event": line}
            wrong.append(f"in its log: {with_story.get('event')}: {str(with_story.get('exception', ''))[-600:]}")
    return wrong


assert set(RENTAL_STATES.values()) == set(RentalState)
