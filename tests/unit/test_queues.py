"""The places of a queue: which owner gets one, and which one waits."""

from __future__ import annotations

import asyncio
from random import Random

from orion.manager.domain.fair_share import Claim
from orion.manager.queues import FairQueue

ONE, TWO = Claim("one"), Claim("two")


async def _wait_for(shares: FairQueue, claim: Claim, got: list[Claim], end: asyncio.Event) -> None:
    async with shares.place(claim):
        got.append(claim)
        await end.wait()


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_an_owner_has_half_of_the_places_and_the_others_the_rest() -> None:
    shares = FairQueue(4)
    assert [shares.take(ONE) for _ in range(3)] == [True, True, False]
    assert [shares.take(TWO) for _ in range(3)] == [True, True, False]
    shares.give_back(TWO)
    assert not shares.take(ONE)
    assert shares.take(Claim("three"))
    assert shares.free == 0


def test_an_owner_may_have_the_only_place() -> None:
    shares = FairQueue(1)
    assert shares.take(ONE)
    assert not shares.take(TWO)
    shares.give_back(ONE)
    assert shares.take(TWO)


def test_failing_calls_share_one_place_of_their_owner_and_half_of_all_places() -> None:
    shares = FairQueue(4)
    failing = [Claim(owner, fails=True) for owner in ("one", "two", "three")]
    assert shares.take(failing[0])
    assert not shares.take(failing[0])
    assert shares.take(ONE), "calls that do not fail go on"
    assert shares.take(failing[1])
    assert not shares.take(failing[2])
    shares.give_back(failing[0])
    assert shares.take(failing[2])


async def test_a_waiting_call_is_overtaken_only_while_its_owner_may_have_no_place() -> None:
    shares, got, end = FairQueue(2), list[Claim](), asyncio.Event()
    assert shares.take(ONE)
    first, second = (asyncio.create_task(_wait_for(shares, each, got, end)) for each in (ONE, TWO))
    await _settle()
    assert got == [TWO], "one has its half"
    shares.give_back(ONE)
    await _settle()
    assert got == [TWO, ONE]
    end.set()
    await asyncio.gather(first, second)
    assert shares.free == 2


async def test_a_cancelled_wait_takes_no_place() -> None:
    shares, got, end = FairQueue(1), list[Claim](), asyncio.Event()
    assert shares.take(ONE)
    early, late = (asyncio.create_task(_wait_for(shares, TWO, got, end)) for _ in range(2))
    await _settle()
    early.cancel()
    shares.give_back(ONE)
    late.cancel()  # its place is granted, and its task has not run yet
    await asyncio.gather(early, late, return_exceptions=True)
    assert got == []
    assert shares.free == 1
    assert shares.take(ONE)


async def test_in_any_history_no_owner_has_more_than_half_of_the_places_and_all_get_one() -> None:
    random, shares, got = Random(7), FairQueue(6), list[Claim]()  # noqa: S311 - nothing secret
    ends = [asyncio.Event() for _ in range(60)]
    claims = [Claim(random.choice("abc"), fails=random.random() < 0.2) for _ in ends]
    tasks = [asyncio.create_task(_wait_for(shares, claim, got, end)) for claim, end in zip(claims, ends, strict=True)]
    for end in random.sample(ends, len(ends)):
        await _settle()
        assert all(shares._taken[Claim(owner)] + shares._taken[Claim(owner, fails=True)] <= 3 for owner in "abc")
        assert all(shares._taken[Claim(owner, fails=True)] <= 1 for owner in "abc")
        assert sum(number for claim, number in shares._taken.items() if claim.fails) <= 3
        end.set()
    await asyncio.gather(*tasks)
    assert sorted(got, key=str) == sorted(claims, key=str)
    assert shares.free == 6
