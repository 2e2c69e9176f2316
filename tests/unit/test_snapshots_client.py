"""How many transfers the client requests from the snapshot service at a time, and for which owners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.builders import host_key

from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.snapshots.client import SnapshotClient
from orion.manager.snapshots.port import Home, SnapshotError
from orion.manager.snapshots.protocol import SnapshotReply, SnapshotRequest
from orion.manager.ssh.port import Host

HOST = Host(worker_id="w-one", address="192.0.2.7", host_keys=(host_key(1),))


@dataclass
class Waiting:
    """A snapshot service that answers a job when a test calls `end`."""

    jobs: dict[str, asyncio.Future[SnapshotReply]] = field(default_factory=dict)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = SnapshotRequest.model_validate_json(await reader.readline())
        ending = self.jobs[request.rental_id] = asyncio.get_running_loop().create_future()
        writer.write((await ending).model_dump_json().encode() + b"\n")
        writer.close()

    def end(self, rental_id: str, code: str) -> None:
        self.jobs.pop(rental_id).set_result(SnapshotReply(ok=False, code=code, message="no"))


@asynccontextmanager
async def serving(folder: Path, max_transfers: int) -> AsyncIterator[tuple[Waiting, SnapshotClient]]:
    snapshot_service = Waiting()
    server = await asyncio.start_unix_server(snapshot_service.serve, folder / "vault.sock")
    async with server:
        yield snapshot_service, SnapshotClient(folder / "vault.sock", max_transfers=max_transfers)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the service above has no event to wait for
            await asyncio.sleep(0)


def copies(client: SnapshotClient, owner: str, *names: str) -> list[asyncio.Task[object]]:
    homes = [Home(rental_id=name, uid=200_000, epoch=1, host=HOST, owner=owner) for name in names]
    return [asyncio.create_task(client.take(home, SnapshotLimits())) for home in homes]


async def test_an_owner_has_half_of_the_transfers_and_one_for_those_that_failed_last(tmp_path: Path) -> None:
    async with serving(tmp_path, 4) as (snapshot_service, client):
        first = copies(client, "one", "onea", "oneb", "onec")
        other = copies(client, "two", "twoa", "twob")
        await until(lambda: len(snapshot_service.jobs) == 4)
        assert snapshot_service.jobs.keys() == {"onea", "oneb", "twoa", "twob"}
        for name in ("onea", "oneb", "twoa", "twob"):
            snapshot_service.end(name, "stalled")
        await until(lambda: "onec" in snapshot_service.jobs)
        snapshot_service.end("onec", "refused")
        ended = await asyncio.gather(*first, *other, return_exceptions=True)
        codes = [error.code for error in ended if isinstance(error, SnapshotError)]
        assert codes == ["stalled", "stalled", "refused", "stalled", "stalled"]
        again = copies(client, "one", "onea", "oneb", "onec") + copies(client, "two", "twoa", "twoc")
        await until(lambda: len(snapshot_service.jobs) == 4)
        assert snapshot_service.jobs.keys() == {"onea", "onec", "twoa", "twoc"}, (
            "rentals whose transfers failed last share one place of their owner"
        )
        snapshot_service.end("onec", "refused")
        await asyncio.wait([again[2]])
        assert "oneb" not in snapshot_service.jobs
        snapshot_service.end("onea", "refused")
        await until(lambda: "oneb" in snapshot_service.jobs)
        for name in list(snapshot_service.jobs):
            snapshot_service.end(name, "refused")
        await asyncio.gather(*again, return_exceptions=True)


async def test_transfers_that_failed_on_one_worker_do_not_wait_on_another(tmp_path: Path) -> None:
    async with serving(tmp_path, 4) as (snapshot_service, client):
        failing = copies(client, "one", "onea", "oneb")
        await until(lambda: len(snapshot_service.jobs) == 2)
        for name in ("onea", "oneb"):
            snapshot_service.end(name, "timed_out")
        await asyncio.gather(*failing, return_exceptions=True)
        elsewhere = Host(worker_id="w-two", address="192.0.2.8", host_keys=(host_key(2),))
        homes = [Home(rental_id=name, uid=200_000, epoch=2, host=elsewhere, owner="one") for name in ("onea", "oneb")]
        restores = [asyncio.create_task(client.restore(home)) for home in homes]
        await until(lambda: len(snapshot_service.jobs) == 2)
        for name in ("onea", "oneb"):
            snapshot_service.end(name, "refused")
        await asyncio.gather(*restores, return_exceptions=True)
