"""The faults that a schedule injects into the platform, and how each is undone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from orion_worker.agent.decisions import Answer

from orion.manager.domain.clocks import Clocks
from orion.manager.domain.states import Intent
from simulation.schedule import Fault

if TYPE_CHECKING:
    from simulation.agents import SimulatedContainer
    from simulation.world import Simulation

FOREVER_S = 1e6
REMOVAL_TRIES = 30
"""How often an operator tries to remove a dead worker."""


class Faults:
    """Makes faults happen, and undoes them."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._undo: list[Callable[[], None]] = []
        self._stopped = False
        self._away_s = 0.0
        self._keys: list[tuple[str, str, int]] = []
        self._kinds: dict[str, Callable[[Fault], None]] = {
            "a worker is killed": self._kill,
            "a worker is stopped": self._stop_worker,
            "all workers are stopped": self._stop_all,
            "a worker is recreated": self._recreate,
            "a worker is cut off": lambda f: self._count(f, self._container(f), "cut_off"),
            "a worker cannot be reached by SSH": lambda f: self._count(f, self._container(f), "no_ssh"),
            "a worker's sshd is killed": lambda f: self._container(f).kill_sshd(),
            "a worker is cut off whole": self._cut_off,
            "a worker is cut off as its sshd is killed": self._kill_sshd_and_cut_off,
            "a worker's disk fails": lambda f: self._count(f, self._container(f), "disk_fails"),
            "a worker is paused": self._pause,
            "the network is bad": lambda f: self._count(f, sim.network, "bad"),
            "the proxy is away": lambda f: self._count(f, sim.network, "proxy_away"),
            "the manager's disk is slow": lambda f: self._count(f, sim, "disk_is_slow"),
            "the manager is killed": self._kill_manager,
            "the manager's clocks change": self._change_clocks,
            "the wall clock jumps": self._jump,
            "a worker is added": self._add,
            "a worker is drained": lambda f: self._intend(f, Intent.DRAINING),
            "a worker is resumed": lambda f: self._intend(f, Intent.ACTIVE),
            "a worker is removed": self._remove,
            "a worker is given up": self._give_up,
            "a client rents": self._rent,
            "a client renews": self._renew,
            "a client releases": self._release,
            "a client migrates": self._migrate,
            "a client repeats its request": self._repeat,
        }

    def happen(self, fault: Fault) -> None:
        self._sim.say("FAULT", str(fault).strip())
        self._kinds[fault.kind](fault)

    def stop(self) -> None:
        """Undo all faults that last; workers that were lost for ever stay lost."""
        self._stopped = True
        for undo in list(self._undo):
            undo()
        if self._sim.manager is not None:
            self._sim.manager.points_left = None

    def manager_died(self) -> None:
        self._undo_after(self._away_s, self._sim.start_manager)

    # -- workers -------------------------------------------------------------------------------------------

    def _container(self, fault: Fault) -> SimulatedContainer:
        there = [c for c in self._sim.containers if c.exists]
        return there[fault.target % len(there)] if there else self._sim.new_container(1)

    def _kill(self, fault: Fault) -> None:
        container = self._container(fault)
        container.kill()
        self._undo_after(fault.lasts_s, lambda: self._start(container))

    def _stop_worker(self, fault: Fault) -> None:
        self._stop(self._container(fault), fault)

    def _stop_all(self, fault: Fault) -> None:
        """Stop all workers as Compose does, one shortly after the other."""
        for number, container in enumerate(c for c in self._sim.containers if c.exists):
            self._sim.loop.call_later(number * fault.figure, self._stop, container, fault)

    def _stop(self, container: SimulatedContainer, fault: Fault) -> None:
        if container.up:
            self._sim.spawn(container.stop())
        self._undo_after(max(4.0, fault.lasts_s), lambda: self._start(container))

    def _recreate(self, fault: Fault) -> None:
        old = self._container(fault)
        old.kill()
        old.exists = False
        address = old.address if fault.target % 2 else None

        def bring() -> None:
            there = address if address and self._sim.container_at(address) is None else None
            self._sim.start_container(self._sim.new_container(old.slots, there))

        self._undo_after(fault.lasts_s, bring)

    def _start(self, container: SimulatedContainer) -> None:
        if container.exists and not container.up:
            self._sim.say(container.name, "starts again")
            self._sim.start_container(container)

    def _pause(self, fault: Fault) -> None:
        container = self._container(fault)
        container.pause()
        self._undo_after(fault.lasts_s, container.resume)

    def _cut_off(self, fault: Fault) -> None:
        """Cut a worker off from the proxy and from the manager's SSH."""
        container = self._container(fault)
        self._count(fault, container, "cut_off")
        self._count(fault, container, "no_ssh")

    def _kill_sshd_and_cut_off(self, fault: Fault) -> None:
        """Let a living worker look dead: its liveness connection ends, then it is cut off."""
        container = self._container(fault)
        container.kill_sshd()
        self._sim.loop.call_later(fault.figure, self._cut_off, fault)

    def _add(self, fault: Fault) -> None:
        self._sim.start_container(self._sim.new_container(int(fault.figure)))

    # -- proxy, manager, operator --------------------------------------------------------------------------

    def _kill_manager(self, fault: Fault) -> None:
        if self._sim.manager is not None:
            self._away_s = fault.lasts_s
            self._sim.manager.points_left = fault.target

    def _change_clocks(self, fault: Fault) -> None:
        self._sim.next_clocks = Clocks().scaled(fault.figure)
        self._kill_manager(fault)

    def _jump(self, fault: Fault) -> None:
        self._sim.wall_offset += fault.figure
        if abs(fault.figure) > 2.0:
            self._sim.checker.jumps.append((self._sim.loop.now, fault.figure))

    def _intend(self, fault: Fault, to: Intent) -> None:
        worker_id = self._sim.worker_id_of(self._container(fault))
        if worker_id:
            self._sim.client(f"{to} {worker_id}", lambda manager: manager.set_intent(worker_id, to))

    def _remove(self, fault: Fault) -> None:
        worker_id = self._sim.worker_id_of(self._container(fault))
        if worker_id:
            self._sim.client(f"remove {worker_id}", lambda manager: manager.remove(worker_id))

    def _give_up(self, fault: Fault) -> None:
        """Kill a worker that an operator removes as soon as it is down, and that comes back all the same."""
        container = self._container(fault)
        worker_id = self._sim.worker_id_of(container)
        self._kill(fault)
        if worker_id:
            self._sim.spawn(self._remove_when_down(worker_id))

    async def _remove_when_down(self, worker_id: str) -> None:
        for _ in range(REMOVAL_TRIES):
            await asyncio.sleep(5.0)
            answer = await self._sim.network.call(None, lambda manager: manager.remove(worker_id), 5.0)
            if answer.status == 204:
                self._sim.say("operator", f"removed {worker_id}")
                return

    # -- clients -------------------------------------------------------------------------------------------

    def _rent(self, fault: Fault) -> None:
        key = str(len(self._keys) + 1)
        self._keys.append((f"client-{key}", key, int(fault.figure)))
        self._send_rent(len(self._keys) - 1)

    def _repeat(self, fault: Fault) -> None:
        if self._keys:
            self._send_rent(fault.target % len(self._keys))

    def _send_rent(self, number: int) -> None:
        owner, key, ttl_s = self._keys[number]

        def answered(answer: Answer) -> None:
            if answer.body["id"] != f"rental-{key}":
                self._sim.fail("one key makes one rental", f"{key}: {answer}")
            self._sim.checker.acknowledged.add(answer.body["id"])

        self._sim.client(f"rent {key}", lambda manager: manager.rent(owner, key, ttl_s), answered)

    def _renew(self, fault: Fault) -> None:
        rental_id = self._acknowledged(fault)
        if rental_id:
            self._sim.client(f"renew {rental_id}", lambda manager: manager.renew(rental_id, int(fault.figure)))

    def _release(self, fault: Fault) -> None:
        rental_id = self._acknowledged(fault)
        if rental_id:
            self._sim.checker.release_asked.add(rental_id)
            self._sim.client(f"release {rental_id}", lambda manager: manager.release(rental_id))

    def _migrate(self, fault: Fault) -> None:
        rental_id = self._acknowledged(fault)
        if rental_id:
            self._sim.client(f"migrate {rental_id}", lambda manager: manager.migrate(rental_id))

    def _acknowledged(self, fault: Fault) -> str:
        known = sorted(self._sim.checker.acknowledged)
        return known[fault.target % len(known)] if known else ""

    # -- undoing -------------------------------------------------------------------------------------------

    def _count(self, fault: Fault, what: object, name: str) -> None:
        setattr(what, name, getattr(what, name) + 1)
        self._undo_after(fault.lasts_s, lambda: setattr(what, name, getattr(what, name) - 1), always=True)

    def _undo_after(self, lasts_s: float, undo: Callable[[], None], always: bool = False) -> None:
        """Undo a fault once, after `lasts_s` or when faults stop; never one that lasts for ever, unless `always`."""
        if lasts_s > FOREVER_S and not always:
            return
        if self._stopped:
            lasts_s = 0.0

        def once() -> None:
            if once in self._undo:
                self._undo.remove(once)
                undo()

        self._undo.append(once)
        if lasts_s <= FOREVER_S:
            self._sim.loop.call_later(lasts_s, once)
