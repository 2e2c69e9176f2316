"""What clients, workers and operators do while the manager may be killed: each a short story that can be told again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import asyncssh
from crash.stage import LOOK_S, NEVER_S, PAUSE_S, Stage, eventually, is_true
from support.builders import host_key
from support.house import Agent

HOUR_S = 3600


@dataclass(frozen=True)
class Act:
    """Crash points count from where it arms the stage: what came before is another act's.

    `workers`: how many have joined before it begins; None: it begins with nothing at all, not even a database.
    """

    play: Callable[[Stage], Awaitable[None]]
    expected: Mapping[str, str] = field(default_factory=dict)
    """The state in which each rental ends, by name."""
    snapshot_interval_s: float = NEVER_S
    passes_over: str = "cop"
    """A pattern: crash points with such names are another act's, or come by a timer and not in every run.

    Whatever is let in is copied at once: what becomes of that is tried by `copying`.
    """
    workers: int | None = 2


async def starting(stage: Stage) -> None:
    """The first start on an empty volume, and workers that call home, each answer being lost in turn."""
    stage.arm()
    for agent in [stage.new_agent(), stage.new_agent()]:
        await stage.until_health(agent, "ready")


async def renting(stage: Stage) -> None:
    """Rent, ask again with the same key, have a key refreshed, wait in the queue, release."""
    stage.arm()
    given = host_key(9001)
    lab = await stage.rent("key-1", name="lab", ssh_public_key=given)
    again = await stage.rent("key-1", name="lab", ssh_public_key=given)
    assert again["id"] == lab["id"]
    made = await stage.rent("key-2", name="made")
    refreshed = await stage.rent("key-2", name="made")
    assert refreshed["id"] == made["id"]
    await stage.until(lambda r: r["state"] == "active", made)
    await _opens(stage, refreshed)
    waiting = await stage.rent("key-3", name="waiting", ssh_public_key=given, wait_s=0)
    await stage.release(lab)
    await stage.until(lambda r: r["state"] == "active", waiting)
    await stage.release(made)


async def _opens(stage: Stage, rental: dict[str, str]) -> None:
    """The private key that was told last is the one that opens it."""
    told = asyncssh.import_private_key(rental["ssh_private_key"]).export_public_key("openssh").decode().strip()
    while True:
        account = (await stage.holder_of(rental)).node.accounts.get(rental["id"])
        if account and account.keys == (told,):
            return
        await asyncio.sleep(LOOK_S)


async def _has_written(stage: Stage, lab: dict[str, str], content: str) -> Agent:
    """Return the worker on which it has a file with this content. On a busy machine one may be lost meanwhile."""
    while True:
        agent = await stage.holder_of(lab)
        agent.node.homes.get(lab["id"], {})["precious"] = content
        if await stage.home(lab) == {"precious": content} and await stage.holder_of(lab) is agent:
            return agent


async def _has_copied(stage: Stage, lab: dict[str, str], content: str) -> Agent:
    """Return the worker on which it has what its newest copy has as well: a file with this content."""
    while True:
        agent = await _has_written(stage, lab, content)
        if is_true(lambda: stage.kept(lab) == {"precious": content}):
            return agent
        await asyncio.sleep(LOOK_S)


async def failing(stage: Stage) -> None:
    """It cannot be made on one worker: cleaned up there, made on the other."""
    broken = stage.agents[0]
    stage.agents[1].node.failure = "no space left on device"
    broken.node.failure = "no space left on device"
    stage.arm()
    lab = await stage.rent("key-1", name="lab", ssh_public_key=host_key(9001), wait_s=0)
    await stage.until(lambda r: r["epoch"] >= 2, lab)
    for agent in stage.agents:
        agent.node.failure = ""
    await stage.until(lambda r: r["state"] == "active", lab)


async def expiring(stage: Stage) -> None:
    """Its time ends while the manager is away; another's is renewed before. An operator confirms the clock."""
    await stage.rent("key-1", name="short", ssh_public_key=host_key(9001), ttl_s=HOUR_S)
    long = await stage.rent("key-2", name="long", ssh_public_key=host_key(9002), ttl_s=HOUR_S)
    stage.arm()
    reply = await stage.ask("POST", f"/api/rentals/{long['id']}/renew", json={"ttl_s": 48 * HOUR_S})
    assert reply.status_code == 200, reply.text
    stage.wall_offset_s = 2.0 * HOUR_S
    stage.kill()
    short = "SELECT * FROM rentals WHERE name = 'short' AND state != 'expired'"
    while not is_true(lambda: not stage.rows(short)):
        await stage.ask("POST", "/api/admin/clock")  # again after each start: one that was killed has forgotten it
        await asyncio.sleep(LOOK_S)


async def migrating(stage: Stage) -> None:
    """A worker dies with a rental; it is made anew elsewhere; the worker returns, and is cleaned before it is ready."""
    lab = await stage.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    dead = await stage.holder_of(lab)
    await eventually(lambda: stage.kept(lab) == {})
    stage.arm()
    dead.die()
    await stage.until(lambda r: r["state"] == "active" and r["worker_id"] != dead.worker_id, lab)
    stage.return_of(dead)
    await stage.until_health(dead, "ready")


async def copying(stage: Stage) -> None:
    """The first copy of a rental's files."""
    stage.arm()
    lab = await stage.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    await eventually(lambda: stage.kept(lab) == {})


async def moving_files(stage: Stage) -> None:
    """Files are copied; their worker dies; they are there before the renter is."""
    lab = await stage.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    dead = await _has_copied(stage, lab, "first")
    stage.arm()
    dead.die()
    await stage.until(lambda r: r["state"] == "active" and r["worker_id"] != dead.worker_id, lab)
    home = await stage.home(lab)
    assert home == {"precious": "first"}, f"it has {home}"
    stage.return_of(dead)
    await stage.until_health(dead, "ready")


async def salvaging(stage: Stage) -> None:
    """The only worker comes back with what was written after the last copy: that is what its rental begins with."""
    lab = await stage.rent("key-1", name="lab", ssh_public_key=host_key(9001), start="serve")
    dead = await _has_copied(stage, lab, "first")
    dead.node.homes[lab["id"]]["precious"] = "later"
    dead.die()
    await stage.until(lambda r: r["state"] == "queued", lab)
    stage.arm()
    stage.return_of(dead)
    await stage.until_health(dead, "ready")
    await stage.until(lambda r: r["state"] == "active", lab)
    home = await stage.home(lab)
    assert home == {"precious": "later"}, f"it has {home}"
    assert dead.node.started[lab["id"]]


async def operating(stage: Stage) -> None:
    """A token for a client, a worker that is drained and resumed."""
    stage.arm()
    created = await stage.ask("POST", "/api/tokens", json={"name": "alice", "role": "client"})
    token = created.json()["token"]
    lab = await stage.rent("key-1", token, name="lab", ssh_public_key=host_key(9001))
    holder = await stage.holder_of(lab)
    assert (await stage.ask("POST", f"/api/workers/{holder.worker_id}/drain")).status_code == 200
    await stage.release(lab)
    await stage.until_worker(holder, lambda worker: worker["intent"] == "drained")
    assert (await stage.ask("POST", f"/api/workers/{holder.worker_id}/resume")).status_code == 200
    await stage.until_health(holder, "ready")
    revoked = await stage.ask("DELETE", f"/api/tokens/{created.json()['id']}")
    assert revoked.status_code == 204, revoked.text
    assert (await stage.ask("GET", "/api/rentals", token)).status_code == 401


async def moving(stage: Stage) -> None:
    """It is moved while it runs, with what it wrote last; asked for again by who got no answer."""
    lab = await stage.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    source = await _has_written(stage, lab, "first")
    stage.arm()
    while True:
        reply = await stage.ask("POST", f"/api/rentals/{lab['id']}/migrate?wait_s=20")
        now = await stage.rental(lab)
        if now["worker_id"] not in {None, source.worker_id} and now["state"] == "active":
            break
        assert reply.status_code in {200, 202, 409}, reply.text
        await asyncio.sleep(PAUSE_S)
    await stage.until(lambda r: r["state"] == "active" and not r["moving_to"], lab)
    await eventually(lambda: not source.node.accounts or lab["id"] not in source.node.accounts)
    await _has_all(stage, lab)


async def draining(stage: Stage) -> None:
    """It is moved away by a drain, which ends; then its worker is told to stop, and it is parked."""
    lab = await stage.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    source = await _has_written(stage, lab, "first")
    other = next(agent for agent in stage.agents if agent is not source)
    stage.arm()
    assert (await stage.ask("POST", f"/api/workers/{source.worker_id}/drain")).status_code == 200
    await stage.until_worker(source, lambda worker: worker["intent"] == "drained")
    other.vacating = True
    await eventually(lambda: not other.node.accounts)
    other.vacating = False
    assert (await stage.ask("POST", f"/api/workers/{source.worker_id}/resume")).status_code == 200
    await stage.until(lambda r: r["state"] == "active", lab)
    await _has_all(stage, lab)


async def _has_all(stage: Stage, lab: dict[str, str]) -> None:
    """Nothing of what it had was lost, though no copy before had it; unless its first worker was not heard.

    On a busy machine that may be heard too late, by the second that it has here: then a copy from before counts.
    """
    home = await stage.home(lab)
    lost = stage.rows("SELECT rental_id, epoch FROM events WHERE kind = 'placement.lost'")
    unheard = {"rental_id": lab["id"], "epoch": 1} in lost
    assert home == {"precious": "first"} or (unheard and home == {}), f"it has {home}; lost: {lost}"


async def removing(stage: Stage) -> None:
    """A worker is removed while it is dead, and comes back as a new one with what it still has."""
    lab = await stage.rent("key-1", name="lab", ssh_public_key=host_key(9001))
    dead = await stage.holder_of(lab)
    await eventually(lambda: stage.kept(lab) == {})
    dead.die()
    await stage.until(lambda r: r["state"] == "active" and r["worker_id"] != dead.worker_id, lab)
    stage.arm()
    removed = await stage.ask("DELETE", f"/api/workers/{dead.worker_id}")
    assert removed.status_code in {204, 404}, removed.text
    former, dead.worker_id = dead.worker_id, ""
    stage.return_of(dead)
    await stage.until_health(dead, "ready")
    assert dead.worker_id != former


ACTS = {
    "starting": Act(starting, workers=None),
    "renting": Act(renting, {"lab": "released", "made": "released", "waiting": "active"}),
    "failing": Act(failing, {"lab": "active"}),
    "expiring": Act(expiring, {"short": "expired", "long": "active"}),
    "migrating": Act(migrating, {"lab": "active"}, snapshot_interval_s=10.0),
    "copying": Act(copying, {"lab": "active"}, snapshot_interval_s=10.0, passes_over="^(?!.*cop)"),
    "moving_files": Act(moving_files, {"lab": "active"}, snapshot_interval_s=2.0, passes_over="cop"),
    "salvaging": Act(salvaging, {"lab": "active"}, snapshot_interval_s=2.0, passes_over="cop", workers=1),
    "moving": Act(moving, {"lab": "active"}),
    "draining": Act(draining, {"lab": "active"}, passes_over="cop|restor|user"),
    "operating": Act(operating, {"lab": "released"}),
    "removing": Act(removing, {"lab": "active"}, snapshot_interval_s=10.0),
}
