"""The vault as the manager sees it: one connection for each request; hanging up ends the job."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orion.manager.channel import AsyncChannel, decode_as
from orion.manager.domain.fair_share import Claim
from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import Snapshot, SnapshotId
from orion.manager.messages import HostMessage
from orion.manager.queues import FairQueue
from orion.manager.snapshots.port import (
    CONNECT_DEADLINE_S,
    NO_PROGRESS_CODES,
    RECOVER_DEADLINE_S,
    RESTORE_DEADLINE_S,
    SNAPSHOT_DEADLINE_S,
    Home,
    SnapshotError,
    Taken,
)
from orion.manager.snapshots.protocol import SnapshotAction, SnapshotReply, SnapshotRequest, read
from orion.manager.ssh.port import Host

MARGIN_S = 5.0
"""Beyond a job's deadline, before the vault is taken for hung."""
CONNECT_WITHIN_S = 5.0
QUICK_DEADLINE_S = 60.0
MAX_REPLY_BYTES = 1 << 20
MAX_TRANSFERS = 28
"""Copies, salvages and restores at a time: fewer than the jobs that the vault takes (MOST_JOBS)."""
MOST_REMEMBERED = 1000
"""Rentals of which it is remembered that they have held a place in vain."""


class SnapshotClient:
    """Implements `port.Vault`."""

    def __init__(self, socket_path: Path, margin_s: float = MARGIN_S, max_transfers: int = MAX_TRANSFERS) -> None:
        """`places`: transfers at a time, of which an owner has half at most."""
        self._socket_path = socket_path
        self._margin_s = margin_s
        self._shares = FairQueue(max_transfers)
        self._without_progress: dict[tuple[str, str], None] = {}
        """The rentals, each on one worker, whose last transfer has held its place in vain; the latest of them last."""
        self._under_way: dict[str, set[asyncio.Future[SnapshotReply]]] = defaultdict(set)
        """The copies and restores of each rental: a restore or a removal ends them."""

    async def copy(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = SNAPSHOT_DEADLINE_S,
        protected: SnapshotId | None = None,
        for_migration: bool = False,
    ) -> Taken:
        more = _limit_fields(limits, protected)
        line = _request(
            SnapshotAction.COPY, home, deadline_s, for_migration=for_migration, pause_s=limits.pause_s, **more
        )
        if for_migration:
            await self._end_all_of(home.rental_id)
        return _taken(await self._begin(line, home))

    async def salvage(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = RECOVER_DEADLINE_S,
        protected: SnapshotId | None = None,
    ) -> Taken:
        line = _request(SnapshotAction.SALVAGE, home, deadline_s, **_limit_fields(limits, protected))
        return _taken(await self._begin(line, home))

    async def restore(
        self,
        home: Home,
        generation: SnapshotId | None = None,
        deadline_s: float = RESTORE_DEADLINE_S,
        previous: SnapshotId | None = None,
        precopy: bool = False,
    ) -> Snapshot | None:
        more = {"generation": str(generation or ""), "previous": str(previous or "")}
        line = _request(SnapshotAction.RESTORE, home, deadline_s, precopy=precopy, **more)
        await self._end_all_of(home.rental_id)
        reply = await self._begin(line, home)
        return read(reply.done) if reply.done else None

    async def connect(self, host: Host, deadline_s: float = CONNECT_DEADLINE_S) -> None:
        line = SnapshotRequest(action=SnapshotAction.CONNECT, host=_host_message(host), deadline_s=deadline_s)
        await self._ask(line, deadline_s)

    async def copies(self, rental_id: str, uid: int) -> list[Snapshot]:
        line = SnapshotRequest(action=SnapshotAction.LIST, rental_id=rental_id, uid=uid, deadline_s=QUICK_DEADLINE_S)
        return [read(copy) for copy in (await self._ask(line, QUICK_DEADLINE_S)).copies]

    async def remove(self, rental_id: str, uid: int) -> None:
        await self._end_all_of(rental_id)
        await self._ask(
            SnapshotRequest(action=SnapshotAction.REMOVE, rental_id=rental_id, uid=uid, deadline_s=QUICK_DEADLINE_S),
            QUICK_DEADLINE_S,
        )

    async def rentals(self) -> list[str]:
        return (
            await self._ask(
                SnapshotRequest(action=SnapshotAction.RENTALS, deadline_s=QUICK_DEADLINE_S), QUICK_DEADLINE_S
            )
        ).rentals

    async def short_of_room(self) -> list[str]:
        return (
            await self._ask(
                SnapshotRequest(action=SnapshotAction.SHORT_OF_ROOM, deadline_s=QUICK_DEADLINE_S), QUICK_DEADLINE_S
            )
        ).owners

    async def _begin(self, line: SnapshotRequest, home: Home) -> SnapshotReply:
        """The reply; raises SnapshotError when something more urgent came for the same rental."""
        under_way = self._under_way[line.rental_id]
        asking = asyncio.ensure_future(self._ask_in_turn(line, home))
        under_way.add(asking)
        try:
            return await asking
        except asyncio.CancelledError:
            asking.cancel()
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise SnapshotError("superseded", "something more urgent came for this rental") from None
        finally:
            under_way.discard(asking)
            if not under_way and self._under_way.get(line.rental_id) is under_way:
                del self._under_way[line.rental_id]

    async def _ask_in_turn(self, line: SnapshotRequest, home: Home) -> SnapshotReply:
        """A salvage has two tries and a time for both: it is not kept waiting for having failed."""
        key = home.rental_id, home.host.worker_id
        fails = key in self._without_progress and line.action is not SnapshotAction.SALVAGE
        async with self._shares.place(Claim(home.owner, fails)):
            try:
                reply = await self._ask(line, line.deadline_s)
            except SnapshotError as error:
                if error.code in NO_PROGRESS_CODES:
                    self._without_progress = self._without_progress | {key: None}
                    while len(self._without_progress) > MOST_REMEMBERED:
                        del self._without_progress[next(iter(self._without_progress))]
                raise
            self._without_progress.pop(key, None)
            return reply

    async def _end_all_of(self, rental_id: str) -> None:
        running = list(self._under_way.get(rental_id, ()))
        for asking in running:
            asking.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _ask(self, line: SnapshotRequest, deadline_s: float) -> SnapshotReply:
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                channel = await AsyncChannel.connect(self._socket_path, MAX_REPLY_BYTES)
        except (OSError, TimeoutError) as error:
            raise SnapshotError("vault_away", "the part of the manager that keeps copies does not answer") from error
        try:
            async with asyncio.timeout(deadline_s + self._margin_s):
                await channel.send(line)
                answer = await channel.receive()
            reply = decode_as(SnapshotReply, answer or b"")
        except TimeoutError as error:
            raise SnapshotError("no_answer", "the vault did not answer in time") from error
        except (OSError, ValueError) as error:
            raise SnapshotError("vault_away", "the vault ended before it answered") from error
        finally:
            channel.close()
            await channel.wait_closed()
        if not reply.ok:
            raise SnapshotError(reply.code, reply.message, reply.restored)
        return reply


def _taken(reply: SnapshotReply) -> Taken:
    if reply.done is None:
        raise SnapshotError("no_answer", "the vault's answer is not one")
    return Taken(read(reply.done), tuple(read(copy) for copy in reply.copies), reply.pause_s)


def _limit_fields(limits: SnapshotLimits, protected: SnapshotId | None) -> dict[str, Any]:
    most = {"max_files": limits.max_files, "max_bytes": limits.max_bytes, "owner_share": limits.owner_share}
    return most | {"generation": str(protected or "")}


def _request(action: SnapshotAction, home: Home, deadline_s: float, **more: Any) -> SnapshotRequest:
    try:
        return SnapshotRequest(
            action=action,
            rental_id=home.rental_id,
            uid=home.uid,
            epoch=home.epoch,
            host=_host_message(home.host),
            owner=home.owner,
            deadline_s=deadline_s,
            **more,
        )
    except ValidationError as error:
        raise SnapshotError("invalid_request", f"not a request for the vault: {error.errors()[0]['msg']}") from error


def _host_message(host: Host) -> HostMessage:
    return HostMessage(worker_id=host.worker_id, address=host.address, port=host.port, host_keys=host.host_keys)
