"""Scenarios of crash tests: actions of clients, workers and operators while the manager may be killed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import asyncssh
from crash.environment import CHECK_S, NEVER_S, PAUSE_S, CrashEnvironment, eventually, is_true
from support.builders import host_key
from support.harness import Agent

HOUR_S = 3600


@dataclass(frozen=True)
class Scenario:
    """A scenario whose crash points count from where it arms the environment. Others cover what comes before.

    `workers`: the number of workers that join before the scenario, or None if it begins without even a database.
    """

    play: Callable[[CrashEnvironment], Awaitable[None]]
    expected: Mapping[str, str] = field(default_factory=dict)
    """The final state of each rental, by name."""
    snapshot_interval_s: float = NEVER_S
    ignored_points: str = "cop"
    """A regular expression for crash points that are ignored: another scenario covers them, or a timer causes them.

    A snapshot of an activated rental is taken at once; the scenario `copying` covers that.
    """
    workers: int | None = 2


async def starting(environment: CrashEnvironment) -> None:
    """Start for the first time on an empty volume, with workers that register."""
    environment.arm()
    for agent in [environment.new_agent(), environment.new_agent()]:
        await environment.until_health(agent, "ready")


async def renting(environment: CrashEnvironment) -> None:
    """Rent, repeat a rent with the same idempotency key, refresh a private key, wait in the queue, and release."""
    environment.arm()
    given = host_key(9001)
    lab = await environment.rent("key-1", name="lab", ssh_public_key=given)
    again = await environment.rent("key-1", name="lab", ssh_public_key=given)
    assert again["id"] == lab["id"]
    made = await environment.rent("key-2", name="made")
    refreshed = await environment.rent("key-2", name="made")
    assert refreshed["id"] == made["id"]
    await environment.until(lambda r: r["state"] == "active", made)
    await _opens(environment, refreshed)
    waiting = await environment.rent("key-3", name="waiting", ssh_public_key=given, wait_s=0)
    await environment.release(lab)
    await environment.until(lambda r: r["state"] == "active", waiting)
    await environment.release(made)


async def _opens(environment: CrashEnvironment, rental: dict[str, str]) -> None:
    """Wait until the rental's account has the key whose private half was returned last."""
    public = asyncssh.import_private_key(rental["ssh_private_key"]).export_public_key("openssh").decode().strip()
    while True:
        account = (await environment.holder_of(rental)).node.accounts.get(rental["id"])
        if account and account.keys == (public,):
            return
        await asyncio.sleep(CHECK_S)


async def _has_written(environment: CrashEnvironment, lab: dict[str, str], content: str) -> Agent:
    """Write a file in the rental's home, and return its worker. On a busy machine a worker may be lost meanwhile."""
    while True:
        agent = await environment.holder_of(lab)
        agent.node.homes.get(lab["id"], {})["precious"] = content
        if await environment.home(lab) == {"precious": content} and await environment.holder_of(lab) is agent:
            return agent


async def _has_copied(environment: CrashEnvironment, lab: dict[str, str], content: str) -> Agent:
    """Write a file in the rental's home, wait until the newest snapshot has it, and return the rental's worker."""
    while True:
        agent = await _has_written(environment, lab, content)
        if is_true(lambda: environment.kept(lab) == {"precious": content}):
            return agent
        await asyncio.sleep(CHECK_S)


async def failing(environment: CrashEnvironment) -> None:
    """Create a rental that fails on one worker: it is cleaned up there and created on the other."""
    broken = environment.agents[0]
    environment.agents[1].node.failure = "no space left on device"
    broken.node.failure = "no space left on device"
    environment.arm()
    lab = await environment.rent("key-1", name="lab", ssh_public_key=host_key(9001), wait_s=0)
    await environment.until(lambda r: r["epoch"] >= 2, lab)
    for agent in environment.agents:
        agent.node.failure = ""
    await environment.until(lambda r: r["state"] == "active", lab)


async def expiring(environment: CrashEnvironment) -> None:
    """Let a rental expire while the manager does not run; renew another before. An operator confirms the clock."""
    await environment.rent("key-1", name="short", ssh_public_key=host_key(9001), ttl_s=HOUR_S)
    long = await environment.rent("key-2", name="long", ssh_public_key=host_key(9002), ttl_s=HOUR_S)
    environment.arm()
    reply = await environment.ask("POST", f"/api/rentals/{long['id']}/renew", json={"ttl_s": 48 * HOUR_S})
    assert reply.status_code == 200, reply.text
    environment.wall_offset_s = 2.0 * HOUR_S
    environment.kill()
    short = "SELECT * FROM rentals WHERE name = 'short' AND state != 'expired'"
    while not is_true(lambda: not environment.rows(short)):
        await environment.ask("POST", "/api/admin/clock")  # repeated, because a manager forgets it when it is killed
        await asyncio.sleep(CHECK_S)


async def migrating(environment: CrashEnvironment) -> None:
    """Kill a worker with a rental: another worker takes it over, and the first is cleaned when it comes back."""
    lab = await environment.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    dead = await environment.holder_of(lab)
    await eventually(lambda: environment.kept(lab) == {})
    environment.arm()
    dead.die()
    await environment.until(lambda r: r["state"] == "active" and r["worker_id"] != dead.worker_id, lab)
    environment.return_of(dead)
    await environment.until_health(dead, "ready")


async def copying(environment: CrashEnvironment) -> None:
    """Make the first snapshot of a rental."""
    environment.arm()
    lab = await environment.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    await eventually(lambda: environment.kept(lab) == {})


async def moving_files(environment: CrashEnvironment) -> None:
    """Kill a worker after a snapshot: the files are restored before the rental is activated on another worker."""
    lab = await environment.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    dead = await _has_copied(environment, lab, "first")
    environment.arm()
    dead.die()
    await environment.until(lambda r: r["state"] == "active" and r["worker_id"] != dead.worker_id, lab)
    home = await environment.home(lab)
    assert home == {"precious": "first"}, f"the home has {home}"
    environment.return_of(dead)
    await environment.until_health(dead, "ready")


async def salvaging(environment: CrashEnvironment) -> None:
    """Bring the only worker back with files newer than the last snapshot: the rental starts with those files."""
    lab = await environment.rent("key-1", name="lab", ssh_public_key=host_key(9001), start="serve")
    dead = await _has_copied(environment, lab, "first")
    dead.node.homes[lab["id"]]["precious"] = "later"
    dead.die()
    await environment.until(lambda r: r["state"] == "queued", lab)
    environment.arm()
    environment.return_of(dead)
    await environment.until_health(dead, "ready")
    await environment.until(lambda r: r["state"] == "active", lab)
    home = await environment.home(lab)
    assert home == {"precious": "later"}, f"the home has {home}"
    assert dead.node.started[lab["id"]]


async def operating(environment: CrashEnvironment) -> None:
    """Create and revoke a client's token, and drain and resume a worker."""
    environment.arm()
    created = await environment.ask("POST", "/api/tokens", json={"name": "alice", "role": "client"})
    token = created.json()["token"]
    lab = await environment.rent("key-1", token, name="lab", ssh_public_key=host_key(9001))
    holder = await environment.holder_of(lab)
    assert (await environment.ask("POST", f"/api/workers/{holder.worker_id}/drain")).status_code == 200
    await environment.release(lab)
    await environment.until_worker(holder, lambda worker: worker["intent"] == "drained")
    assert (await environment.ask("POST", f"/api/workers/{holder.worker_id}/resume")).status_code == 200
    await environment.until_health(holder, "ready")
    revoked = await environment.ask("DELETE", f"/api/tokens/{created.json()['id']}")
    assert revoked.status_code == 204, revoked.text
    assert (await environment.ask("GET", "/api/rentals", token)).status_code == 401


async def moving(environment: CrashEnvironment) -> None:
    """Migrate a running rental with its last writes; the request is repeated if it gets no answer."""
    lab = await environment.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    source = await _has_written(environment, lab, "first")
    environment.arm()
    while True:
        reply = await environment.ask("POST", f"/api/rentals/{lab['id']}/migrate?wait_s=20")
        now = await environment.rental(lab)
        if now["worker_id"] not in {None, source.worker_id} and now["state"] == "active":
            break
        assert reply.status_code in {200, 202, 409}, reply.text
        await asyncio.sleep(PAUSE_S)
    await environment.until(lambda r: r["state"] == "active" and not r["moving_to"], lab)
    await eventually(lambda: not source.node.accounts or lab["id"] not in source.node.accounts)
    await _has_all(environment, lab)


async def draining(environment: CrashEnvironment) -> None:
    """Drain the rental's worker, so that it migrates, then stop its next worker, so that it is parked."""
    lab = await environment.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    source = await _has_written(environment, lab, "first")
    other = next(agent for agent in environment.agents if agent is not source)
    environment.arm()
    assert (await environment.ask("POST", f"/api/workers/{source.worker_id}/drain")).status_code == 200
    await environment.until_worker(source, lambda worker: worker["intent"] == "drained")
    other.evacuating = True
    await eventually(lambda: not other.node.accounts)
    other.evacuating = False
    assert (await environment.ask("POST", f"/api/workers/{source.worker_id}/resume")).status_code == 200
    await environment.until(lambda r: r["state"] == "active", lab)
    await _has_all(environment, lab)


async def _has_all(environment: CrashEnvironment, lab: dict[str, str]) -> None:
    """Assert that the rental kept its file, which no snapshot had, unless its first worker was declared down.

    On a busy machine the manager may receive that worker's heartbeat too late for the short clocks of these tests.
    """
    home = await environment.home(lab)
    lost = environment.rows("SELECT rental_id, epoch FROM events WHERE kind = 'placement.lost'")
    was_down = {"rental_id": lab["id"], "epoch": 1} in lost
    assert home == {"precious": "first"} or (was_down and home == {}), f"the home has {home}; lost: {lost}"


async def removing(environment: CrashEnvironment) -> None:
    """Remove a dead worker, which then comes back as a new worker with its old files."""
    lab = await environment.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    dead = await environment.holder_of(lab)
    await eventually(lambda: environment.kept(lab) == {})
    dead.die()
    await environment.until(lambda r: r["state"] == "active" and r["worker_id"] != dead.worker_id, lab)
    environment.arm()
    removed = await environment.ask("DELETE", f"/api/workers/{dead.worker_id}")
    assert removed.status_code in {204, 404}, removed.text
    former, dead.worker_id = dead.worker_id, ""
    environment.return_of(dead)
    await environment.until_health(dead, "ready")
    assert dead.worker_id != former


SCENARIOS = {
    "starting": Scenario(starting, workers=None),
    "renting": Scenario(renting, {"lab": "released", "made": "released", "waiting": "active"}),
    "failing": Scenario(failing, {"lab": "active"}),
    "expiring": Scenario(expiring, {"short": "expired", "long": "active"}),
    "migrating": Scenario(migrating, {"lab": "active"}, snapshot_interval_s=10.0),
    "copying": Scenario(copying, {"lab": "active"}, snapshot_interval_s=10.0, ignored_points="^(?!.*cop)"),
    "moving_files": Scenario(moving_files, {"lab": "active"}, snapshot_interval_s=2.0, ignored_points="cop"),
    "salvaging": Scenario(salvaging, {"lab": "active"}, snapshot_interval_s=2.0, ignored_points="cop", workers=1),
    "moving": Scenario(moving, {"lab": "active"}),
    "draining": Scenario(draining, {"lab": "active"}, ignored_points="cop|restor|user"),
    "operating": Scenario(operating, {"lab": "released"}),
    "removing": Scenario(removing, {"lab": "active"}, snapshot_interval_s=10.0),
}
