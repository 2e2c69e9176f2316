"""The contract of the snapshot service: unit tests run it on the fake, integration tests on the real one.

Its tests look at homes and at kept snapshots, never at calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from itertools import count

import pytest

from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import BLOCK_BYTES, SnapshotId
from orion.manager.snapshots.port import (
    ALREADY_ACTIVATED,
    NO_SUCH_SNAPSHOT,
    NOTHING_TO_RECOVER,
    OVER_LIMIT,
    OVER_SHARE,
    Home,
    SnapshotError,
    SnapshotService,
)
from orion.manager.ssh.port import Host

LIMITS = SnapshotLimits(max_files=1000, max_bytes=1 << 20)
LARGE_BYTES = 20 * BLOCK_BYTES
_numbers = count(1)


class SnapshotBench(ABC):
    """A snapshot service and two workers."""

    snapshot_service: SnapshotService
    hosts: tuple[Host, Host]

    def new_home(self, epoch: int = 1) -> Home:
        """Return the home of a new rental on the first worker; `create` makes it."""
        number = next(_numbers)
        name = f"vault{number:03d}".translate(str.maketrans("0123456789", "abcdefghij"))
        return Home(rental_id=name, uid=2_000_000_000 + number, epoch=epoch, host=self.hosts[0])

    def moved(self, home: Home) -> Home:
        """Return the home of the same rental at its next epoch, on the other worker."""
        other = next(host for host in self.hosts if host != home.host)
        return replace(home, epoch=home.epoch + 1, host=other)

    async def owned_by(self, owner: Home | None = None) -> Home:
        """Return the home of an active rental, of the same owner as `owner` or of a new one."""
        home = self.new_home()
        home = replace(home, owner=owner.owner if owner else f"owner-{home.rental_id}")
        await self.create(home, activated=True)
        return home

    async def copy_other(self, home: Home, limits: SnapshotLimits) -> list[str]:
        """Take a snapshot with LARGE_BYTES that the last one does not have; return the ids of all that are kept."""
        letter = chr(ord("a") + next(_numbers) % 26)
        await self.write(home, "large", letter * LARGE_BYTES)
        return [str(copy.id) for copy in (await self.snapshot_service.take(home, limits)).kept]

    def room_for(self, copies: float) -> SnapshotLimits:
        """Return limits that give each owner a share of the disk for this many snapshots of LARGE_BYTES."""
        return replace(LIMITS, owner_share=copies * (LARGE_BYTES + BLOCK_BYTES) / self.disk_bytes)

    @property
    @abstractmethod
    def disk_bytes(self) -> int: ...

    @abstractmethod
    async def create(self, home: Home, activated: bool) -> None: ...

    @abstractmethod
    async def write(self, home: Home, name: str, content: str) -> None: ...

    @abstractmethod
    async def remove(self, home: Home, name: str) -> None: ...

    @abstractmethod
    async def files(self, home: Home) -> dict[str, str]: ...


async def refusal(awaitable: object) -> SnapshotError:
    with pytest.raises(SnapshotError) as refused:
        await awaitable  # type: ignore[misc]
    return refused.value


class SnapshotServiceContract:
    """A subclass gives the fixture `bench`."""

    async def test_a_snapshot_from_one_worker_is_restored_into_a_locked_home_on_another(
        self, bench: SnapshotBench
    ) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        await bench.write(home, "one", "first")
        await bench.write(home, "two", "second")
        copied = await bench.snapshot_service.take(home, LIMITS)
        assert (copied.snapshot.id, copied.snapshot.files, copied.snapshot.bytes) == (
            SnapshotId(1, 1),
            3,
            3 * BLOCK_BYTES,
        ), "the home itself and two files"
        target = bench.moved(home)
        await bench.create(target, activated=False)
        assert await bench.snapshot_service.restore(target) == copied.snapshot
        assert await bench.files(target) == {"one": "first", "two": "second"}

    async def test_a_restore_without_a_snapshot_changes_nothing(self, bench: SnapshotBench) -> None:
        home = bench.new_home()
        await bench.create(home, activated=False)
        assert await bench.snapshot_service.restore(home) is None
        assert await bench.files(home) == {}
        assert await bench.snapshot_service.snapshots(home.rental_id, home.uid) == []

    async def test_an_open_connection_is_used_only_for_the_worker_with_the_pinned_host_key(
        self, bench: SnapshotBench
    ) -> None:
        one, other = bench.hosts
        await bench.snapshot_service.connect(one)
        await bench.snapshot_service.connect(one)
        refused = await refusal(bench.snapshot_service.connect(replace(one, host_keys=other.host_keys)))
        assert refused.code == "unreachable"

    async def test_a_restore_may_be_repeated_until_the_activation_and_never_afterwards(
        self, bench: SnapshotBench
    ) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        await bench.write(home, "file", "old")
        await bench.snapshot_service.take(home, LIMITS)
        target = bench.moved(home)
        await bench.create(target, activated=False)
        for _ in range(2):
            assert await bench.snapshot_service.restore(target)
        await bench.create(target, activated=True)
        await bench.write(target, "file", "newer than any copy")
        refused = await refusal(bench.snapshot_service.restore(target))
        assert (refused.code, refused.restored) == (ALREADY_ACTIVATED, "1-1")
        assert await bench.files(target) == {"file": "newer than any copy"}

    async def test_a_prepared_snapshot_has_the_changes_since_its_preparation(self, bench: SnapshotBench) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        for name in ("changed", "removed", "same"):
            await bench.write(home, name, name)
        first = (await bench.snapshot_service.take(home, LIMITS, for_migration=True)).snapshot.id
        target = bench.moved(home)
        await bench.create(target, activated=False)
        assert await bench.snapshot_service.restore(target, first, precopy=True)
        await bench.write(home, "changed", "twice")
        await bench.remove(home, "removed")
        last = await bench.snapshot_service.take(home, LIMITS, for_migration=True)
        assert [str(copy.id) for copy in last.kept] == ["1-1", "1-2"]
        assert await bench.snapshot_service.restore(target, last.snapshot.id, previous=first) == last.snapshot
        assert await bench.files(target) == {"changed": "twice", "same": "same"}
        assert (
            await bench.snapshot_service.restore(target, last.snapshot.id, previous=last.snapshot.id) == last.snapshot
        )
        assert await bench.files(target) == {"changed": "twice", "same": "same"}
        other = bench.moved(target)
        await bench.create(other, activated=False)
        assert await bench.snapshot_service.restore(other, last.snapshot.id, previous=last.snapshot.id), (
            "the home was not filled"
        )
        assert await bench.files(other) == {"changed": "twice", "same": "same"}
        await bench.snapshot_service.restore(other, first)
        assert await bench.files(other) == {"changed": "changed", "removed": "removed", "same": "same"}

    async def test_an_older_snapshot_is_restored_when_it_is_named_and_exists(self, bench: SnapshotBench) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        for content in ("a", "bb"):
            await bench.write(home, "file", content)
            await bench.snapshot_service.take(home, LIMITS)
        target = bench.moved(home)
        await bench.create(target, activated=False)
        restored = await bench.snapshot_service.restore(target, SnapshotId(1, 1))
        assert restored
        assert restored.id == SnapshotId(1, 1)
        assert await bench.files(target) == {"file": "a"}
        assert (await refusal(bench.snapshot_service.restore(target, SnapshotId(1, 9)))).code == NO_SUCH_SNAPSHOT
        assert await bench.files(target) == {"file": "a"}

    async def test_snapshots_are_ordered_by_epoch_first_and_the_newest_of_the_former_epoch_is_kept(
        self, bench: SnapshotBench
    ) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        for number in range(5):
            await bench.write(home, "file", "x" * number)
            kept = (await bench.snapshot_service.take(home, LIMITS)).kept
        assert [str(copy.id) for copy in kept] == ["1-3", "1-4", "1-5"]
        target = bench.moved(home)
        await bench.create(target, activated=False)
        await bench.snapshot_service.restore(target)
        await bench.create(target, activated=True)
        for number in range(4):
            await bench.write(target, "file", "y" * number)
            kept = (await bench.snapshot_service.take(target, LIMITS)).kept
        assert [str(copy.id) for copy in kept] == ["1-5", "2-2", "2-3", "2-4"]
        assert await bench.snapshot_service.snapshots(home.rental_id, home.uid) == list(kept)

    async def test_an_unchanged_home_renews_the_time_of_the_newest_snapshot(self, bench: SnapshotBench) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        await bench.write(home, "file", "same")
        await bench.write(home, "other", "")
        first = (await bench.snapshot_service.take(home, LIMITS)).snapshot
        second = (await bench.snapshot_service.take(home, LIMITS)).snapshot
        assert second.id == first.id
        assert second.at > first.at
        await bench.remove(home, "other")
        assert (await bench.snapshot_service.take(home, LIMITS)).snapshot.id == SnapshotId(1, 2)

    async def test_a_change_within_a_second_that_keeps_the_size_is_found(self, bench: SnapshotBench) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        for number, content in enumerate(("one", "two", "six"), start=1):
            await bench.write(home, "file", content)
            assert (await bench.snapshot_service.take(home, LIMITS)).snapshot.id == SnapshotId(1, number)

    async def test_only_the_present_epoch_gets_snapshots(self, bench: SnapshotBench) -> None:
        home = bench.new_home(epoch=2)
        await bench.create(home, activated=True)
        for epoch in (1, 3):
            assert (
                await refusal(bench.snapshot_service.take(replace(home, epoch=epoch), LIMITS))
            ).code == "stale_epoch"
        assert (await refusal(bench.snapshot_service.take(bench.new_home(), LIMITS))).code == "unknown_rental"

    async def test_a_home_over_its_limits_gets_no_snapshot_and_the_last_one_is_kept(self, bench: SnapshotBench) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        await bench.write(home, "file", "x" * 2000)
        copied = await bench.snapshot_service.take(home, LIMITS)
        await bench.write(home, "more", "x" * 2000)
        for limits in (
            SnapshotLimits(max_files=1000, max_bytes=3 * BLOCK_BYTES - 1),
            SnapshotLimits(max_files=2, max_bytes=1 << 20),
        ):
            assert (await refusal(bench.snapshot_service.take(home, limits))).code == OVER_LIMIT
        assert await bench.snapshot_service.snapshots(home.rental_id, home.uid) == [copied.snapshot]

    async def test_beyond_the_owner_s_share_the_oldest_snapshots_are_removed_for_a_new_one(
        self, bench: SnapshotBench
    ) -> None:
        home = await bench.owned_by()
        kept = [await bench.copy_other(home, bench.room_for(2.5)) for _ in range(3)]
        assert kept == [["1-1"], ["1-1", "1-2"], ["1-2", "1-3"]]
        assert home.owner not in await bench.snapshot_service.short_of_room()

    async def test_the_last_snapshot_is_not_removed_for_a_new_one_which_is_refused(self, bench: SnapshotBench) -> None:
        home = await bench.owned_by()
        await bench.copy_other(home, LIMITS)
        await bench.copy_other(home, LIMITS)
        await bench.write(home, "more", "x")
        assert (await refusal(bench.snapshot_service.take(home, bench.room_for(0.9)))).code == OVER_SHARE
        kept = [str(copy.id) for copy in await bench.snapshot_service.snapshots(home.rental_id, home.uid)]
        assert kept == ["1-1", "1-2"]

    async def test_one_owner_has_its_share_and_others_are_not_affected(self, bench: SnapshotBench) -> None:
        room = bench.room_for(2.5)
        first = await bench.owned_by()
        second, other = await bench.owned_by(first), await bench.owned_by()
        assert [await bench.copy_other(first, room) for _ in range(2)] == [["1-1"], ["1-1", "1-2"]]
        await bench.write(second, "large", "x" * LARGE_BYTES)
        assert (await refusal(bench.snapshot_service.take(second, room))).code == OVER_SHARE
        assert await bench.snapshot_service.snapshots(second.rental_id, second.uid) == []
        assert {first.owner, other.owner}.intersection(await bench.snapshot_service.short_of_room()) == {first.owner}
        assert [await bench.copy_other(other, room) for _ in range(2)] == [["1-1"], ["1-1", "1-2"]]
        unchanged = await bench.snapshot_service.take(first, room)
        assert [str(copy.id) for copy in unchanged.kept] == ["1-2"], "the first makes room for the second"
        assert (await bench.snapshot_service.take(second, room)).snapshot.id == SnapshotId(1, 1)
        assert first.owner not in await bench.snapshot_service.short_of_room()

    async def test_removed_snapshots_free_room_in_the_owner_s_share(self, bench: SnapshotBench) -> None:
        room = bench.room_for(1.5)
        first = await bench.owned_by()
        second = await bench.owned_by(first)
        await bench.copy_other(first, room)
        await bench.write(second, "large", "x" * LARGE_BYTES)
        assert (await refusal(bench.snapshot_service.take(second, room))).code == OVER_SHARE
        await bench.snapshot_service.remove(first.rental_id, first.uid)
        assert (await bench.snapshot_service.take(second, room)).snapshot.id == SnapshotId(1, 1)

    async def test_a_removal_deletes_all_snapshots_of_its_rental_and_no_others(self, bench: SnapshotBench) -> None:
        homes = [bench.new_home(), bench.new_home()]
        for home in homes:
            await bench.create(home, activated=True)
            await bench.snapshot_service.take(home, LIMITS)
        gone, stays = homes
        for _ in range(2):
            await bench.snapshot_service.remove(gone.rental_id, gone.uid)
        assert await bench.snapshot_service.snapshots(gone.rental_id, gone.uid) == []
        kept = await bench.snapshot_service.rentals()
        assert (gone.rental_id in kept, stays.rental_id in kept) == (False, True)

    async def test_a_worker_that_does_not_answer_or_has_another_host_key_is_reported_as_unreachable(
        self, bench: SnapshotBench
    ) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        nowhere = replace(home, host=replace(home.host, port=1))
        impostor = replace(home, host=replace(home.host, host_keys=bench.hosts[1].host_keys))
        for wrong in (nowhere, impostor):
            assert (await refusal(bench.snapshot_service.take(wrong, LIMITS))).code == "unreachable"

    async def test_the_home_of_a_lost_epoch_is_recovered_and_not_restored_by_itself(self, bench: SnapshotBench) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        await bench.write(home, "file", "copied")
        copied = await bench.snapshot_service.take(home, LIMITS)
        await bench.write(home, "file", "written after that")
        salvaged = await bench.snapshot_service.recover(home, LIMITS)
        assert (salvaged.snapshot.id, salvaged.snapshot.recovered) == (SnapshotId(1, 2), True)
        assert [copy.recovered for copy in salvaged.kept] == [False, True]
        assert (await bench.snapshot_service.recover(home, LIMITS)).snapshot.id == SnapshotId(1, 2), "once is enough"
        assert (await refusal(bench.snapshot_service.take(home, LIMITS))).code == "laid_down"
        target = bench.moved(home)
        await bench.create(target, activated=False)
        assert await bench.snapshot_service.restore(target) == copied.snapshot
        assert await bench.files(target) == {"file": "copied"}
        assert await bench.snapshot_service.restore(target, SnapshotId(1, 2))
        assert await bench.files(target) == {"file": "written after that"}

    async def test_a_lost_home_equal_to_its_last_snapshot_makes_no_recovered_snapshot(
        self, bench: SnapshotBench
    ) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        await bench.write(home, "file", "same")
        copied = await bench.snapshot_service.take(home, LIMITS)
        salvaged = await bench.snapshot_service.recover(home, LIMITS)
        assert (salvaged.snapshot.id, salvaged.snapshot.recovered) == (copied.snapshot.id, False)

    async def test_the_latest_recovered_snapshots_and_the_needed_one_are_kept(self, bench: SnapshotBench) -> None:
        home = bench.new_home()
        await bench.create(home, activated=True)
        for number, protected in ((1, None), (2, None), (3, SnapshotId(1, 1)), (4, SnapshotId(1, 1)), (5, None)):
            await bench.write(home, "file", f"version {number}")
            salvaged = await bench.snapshot_service.recover(home, LIMITS, protected=protected)
            oldest = (1,) if number == 1 or protected else ()
            latest = (number - 1, number) if number > 1 else ()
            staying = {1, 2} if number == 2 else {*oldest, *latest}
            assert {copy.id.number for copy in salvaged.kept} == staying

    async def test_only_a_home_that_was_activated_at_that_epoch_is_recovered(self, bench: SnapshotBench) -> None:
        home = bench.new_home(epoch=2)
        await bench.create(home, activated=False)
        assert (await refusal(bench.snapshot_service.recover(home, LIMITS))).code == NOTHING_TO_RECOVER
        await bench.create(home, activated=True)
        for epoch in (1, 3):
            assert (
                await refusal(bench.snapshot_service.recover(replace(home, epoch=epoch), LIMITS))
            ).code == "stale_epoch"
        await bench.write(home, "file", "x" * 2000)
        assert (
            await refusal(bench.snapshot_service.recover(home, SnapshotLimits(max_files=1000, max_bytes=1000)))
        ).code == OVER_LIMIT
        assert await bench.snapshot_service.snapshots(home.rental_id, home.uid) == []
