"""Durations as written on the command line."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.cli import durations
from orion.errors import InvalidInput


@given(st.integers(min_value=0, max_value=10**9))
def test_what_is_written_is_read_back(seconds: int) -> None:
    assert durations.parse(durations.exact(seconds)) == seconds


@given(st.text("0129smhd -.\u0663", max_size=12))
def test_any_text_is_a_duration_or_a_clear_refusal(text: str) -> None:
    with suppress(InvalidInput):
        assert durations.parse(text) >= 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604800), ("1h30m", 5400), ("0", 0), ("45", 45), (" 2H ", 7200)],
)
def test_the_usual_ways_to_write_one(text: str, seconds: int) -> None:
    assert durations.parse(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5s", "5 s", "1.5h", "30m2h", "2w", "٣s", "9" * 40])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        durations.parse(text)


@given(st.floats(min_value=0, max_value=10**8))
def test_a_rough_duration_is_short(seconds: float) -> None:
    assert len(durations.rough(seconds)) <= 7


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7140, "119 min"), (7200, "2 h"), (86399.5, "24 h"), (200000, "2 d")],
)
def test_a_rough_duration_has_the_unit_that_fits(seconds: int, text: str) -> None:
    assert durations.rough(seconds) == text
