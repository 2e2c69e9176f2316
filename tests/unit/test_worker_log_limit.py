"""How many lines of sshd's output reach the container's log."""

from __future__ import annotations

import os

import pytest
from orion_worker.limits.log_limit import BURST, LINE_EVERY_S, LONGEST_BYTES, LimitedLog

LEFT_OUT = "orion-agent: {} lines of sshd's were left out: too many at a time"


@pytest.fixture
def written() -> list[str]:
    return []


@pytest.fixture
def log(written: list[str]) -> LimitedLog:
    made = LimitedLog(written.append)
    made.take(b"", 1000.0)
    return made


def test_complete_lines_are_logged_and_partial_ones_once_they_are_complete(log: LimitedLog, written: list[str]) -> None:
    log.take(b"one\r\ntwo\nth", 1000.0)
    assert written == ["one", "two"]
    log.take(b"ree \xff\n", 1000.0)
    assert written == ["one", "two", "three \N{REPLACEMENT CHARACTER}"]


def test_excess_lines_are_counted_and_the_count_is_logged_when_there_is_room(
    log: LimitedLog, written: list[str]
) -> None:
    log.take(b"x\n" * (BURST + 50), 1000.0)
    assert written == ["x"] * BURST
    log.take(b"", 1000.0 + 1.5 * LINE_EVERY_S)
    assert written[BURST:] == [LEFT_OUT.format(50)]
    log.take(b"y\n", 1000.0 + 1.5 * LINE_EVERY_S)
    assert len(written) == BURST + 1
    log.take(b"z\n", 1000.0 + 5 * LINE_EVERY_S)
    assert written[BURST + 1 :] == [LEFT_OUT.format(1), "z"]


def test_a_flood_is_logged_with_as_many_lines_as_the_rate_allows(log: LimitedLog, written: list[str]) -> None:
    for number in range(1000):
        log.take(b"x\n" * 100, 1000.0 + number / 100)
    assert len(written) <= BURST + 10 / LINE_EVERY_S + 1
    log.take(b"", 2000.0)
    log.take(b"x\n" * BURST * 2, 2000.0)
    assert written.count("x") <= 2 * BURST + 10 / LINE_EVERY_S, "unused lines are not saved up"


def test_a_line_without_an_end_is_cut(log: LimitedLog, written: list[str]) -> None:
    for _ in range(3):
        log.take(b"x" * (LONGEST_BYTES + 1), 1000.0)
    assert written == ["x" * LONGEST_BYTES] * 3


def test_a_writer_to_the_log_never_waits(log: LimitedLog) -> None:
    assert not os.get_blocking(log.input)
    os.write(log.input, b"x" * (1 << 20))
    with pytest.raises(BlockingIOError):
        os.write(log.input, b"x")
