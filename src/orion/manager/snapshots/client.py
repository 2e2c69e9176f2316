"""The client of the snapshot service. It opens one connection for each request; closing it ends the job."""

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
"""Seconds after a job's deadline at which the snapshot service counts as hung."""
CONNECT_WITHIN_S = 5.0
QUICK_DEADLINE_S = 60.0
MAX_REPLY_BYTES = 1 << 20
MAX_TRANSFERS = 28
"""Snapshots and restores at a time: fewer than the jobs that the snapshot service runs (MAX_JOBS)."""
MAX_REMEMBERED = 1000
"""Rentals whose last transfer made no progress that are remembered."""


class SnapshotClient:
    """The real `port.SnapshotService`."""

    def __init__(self, socket_path: Path, max_transfers: int = MAX_TRANSFERS) -> None:
        """`max_transfers`: snapshots and restores at a time, of which an owner has half at most."""
        self._socket_path = socket_path
        self._shares = FairQueue(max_transfers)
        self._without_progress: dict[tuple[str, str], None] = {}
        """The rental and worker of each transfer that made no progress and was the last of its kind, in their order."""
        self._under_way: dict[str, set[asyncio.Future[SnapshotReply]]] = defaultdict(set)
        """The running requests of each rental. A restore or a removal ends them."""

    async def take(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = SNAPSHOT_DEADLINE_S,
        protected: SnapshotId | None = None,
        for_migration: bool = False,
    ) -> Taken:
        more = _limit_fields(limits, protected) | {"for_migration": for_migration, "pause_s": limits.pause_s}
        return await self._take(_request(SnapshotAction.COPY, home, deadline_s, **more), home)

    async def recover(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = RECOVER_DEADLINE_S,
        protected: SnapshotId | None = None,
    ) -> Taken:
        more = _limit_fields(limits, protected)
        return await self._take(_request(SnapshotAction.RECOVER, home, deadline_s, **more), home)

    async def restore(
        self,
        home: Home,
        snapshot_id: SnapshotId | None = None,
        deadline_s: float = RESTORE_DEADLINE_S,
        previous: SnapshotId | None = None,
        precopy: bool = False,
    ) -> Snapshot | None:
        more = {"generation": str(snapshot_id or ""), "previous": str(previous or "")}
        request = _request(SnapshotAction.RESTORE, home, deadline_s, precopy=precopy, **more)
        await self._end_all_of(home.rental_id)
        reply = await self._begin(request, home)
        return read(reply.done) if reply.done else None

    async def connect(self, host: Host, deadline_s: float = CONNECT_DEADLINE_S) -> None:
        request = SnapshotRequest(action=SnapshotAction.CONNECT, host=HostMessage.of(host), deadline_s=deadline_s)
        await self._ask(request)

    async def snapshots(self, rental_id: str, uid: int) -> list[Snapshot]:
        reply = await self._ask_quickly(SnapshotAction.LIST, rental_id=rental_id, uid=uid)
        return [read(copy) for copy in reply.copies]

    async def remove(self, rental_id: str, uid: int) -> None:
        await self._end_all_of(rental_id)
        await self._ask_quickly(SnapshotAction.REMOVE, rental_id=rental_id, uid=uid)

    async def rentals(self) -> list[str]:
        return (await self._ask_quickly(SnapshotAction.RENTALS)).rentals

    async def short_of_room(self) -> list[str]:
        return (await self._ask_quickly(SnapshotAction.SHORT_OF_ROOM)).owners

    async def _take(self, request: SnapshotRequest, home: Home) -> Taken:
        if request.for_migration:
            await self._end_all_of(home.rental_id)
        reply = await self._begin(request, home)
        if reply.done is None:
            raise SnapshotError("no_answer", "the answer of the snapshot service is not valid")
        return Taken(read(reply.done), tuple(read(copy) for copy in reply.copies), reply.pause_s)

    async def _begin(self, request: SnapshotRequest, home: Home) -> SnapshotReply:
        """Return the reply. Raise SnapshotError if a more urgent request for the same rental ended this one."""
        under_way = self._under_way[request.rental_id]
        running_request = asyncio.ensure_future(self._ask_in_turn(request, home))
        under_way.add(running_request)
        try:
            return await running_request
        except asyncio.CancelledError:
            running_request.cancel()
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise SnapshotError("superseded", "something more urgent came for this rental") from None
        finally:
            under_way.discard(running_request)
            if not under_way and self._under_way.get(request.rental_id) is under_way:
                del self._under_way[request.rental_id]

    async def _ask_in_turn(self, request: SnapshotRequest, home: Home) -> SnapshotReply:
        """Ask when the owner's claim gets a place. A recovery has only two tries, so it never counts as failing."""
        key = home.rental_id, home.host.worker_id
        fails = key in self._without_progress and request.action is not SnapshotAction.RECOVER
        async with self._shares.place(Claim(home.owner, fails)):
            try:
                reply = await self._ask(request)
            except SnapshotError as error:
                if error.code in NO_PROGRESS_CODES:
                    self._without_progress[key] = None
                    while len(self._without_progress) > MAX_REMEMBERED:
                        del self._without_progress[next(iter(self._without_progress))]
                raise
            self._without_progress.pop(key, None)
            return reply

    async def _end_all_of(self, rental_id: str) -> None:
        running = list(self._under_way.get(rental_id, ()))
        for running_request in running:
            running_request.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _ask_quickly(self, action: SnapshotAction, **more: Any) -> SnapshotReply:
        return await self._ask(SnapshotRequest(action=action, deadline_s=QUICK_DEADLINE_S, **more))

    async def _ask(self, request: SnapshotRequest) -> SnapshotReply:
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                channel = await AsyncChannel.connect(self._socket_path, MAX_REPLY_BYTES)
        except (OSError, TimeoutError) as error:
            raise SnapshotError("vault_away", "the snapshot service does not answer") from error
        try:
            async with asyncio.timeout(request.deadline_s + MARGIN_S):
                await channel.send(request)
                answer = await channel.receive()
            reply = decode_as(SnapshotReply, answer or b"")
        except TimeoutError as error:
            raise SnapshotError("no_answer", "the snapshot service did not answer in time") from error
        except (OSError, ValueError) as error:
            raise SnapshotError("vault_away", "the snapshot service ended before it answered") from error
        finally:
            channel.close()
            await channel.wait_closed()
        if not reply.ok:
            raise SnapshotError(reply.code, reply.message, reply.restored)
        return reply


def _limit_fields(limits: SnapshotLimits, protected: SnapshotId | None) -> dict[str, Any]:
    most = {"max_files": limits.max_files, "max_bytes": limits.max_bytes, "owner_share": limits.owner_share}
    return most | {"generation": str(protected or "")}


def _request(action: SnapshotAction, home: Home, deadline_s: float, **more: Any) -> SnapshotRequest:
    of = {"rental_id": home.rental_id, "uid": home.uid, "epoch": home.epoch, "owner": home.owner}
    try:
        return SnapshotRequest(action=action, host=HostMessage.of(home.host), deadline_s=deadline_s, **of, **more)
    except ValidationError as error:
        raise SnapshotError("invalid_request", f"not a valid request: {error.errors()[0]['msg']}") from error
