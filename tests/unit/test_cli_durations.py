"""Durations as written on the command line."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.cli import durations
from orion.errors import InvalidInput


@given(st.integers(min_value=0, max_value=10**9))
def test_a_formatted_duration_is_parsed_back(seconds: int) -> None:
    assert durations.parse(durations.exact(seconds)) == seconds


@given(st.text("0129smhd -.\u0663", max_size=12))
def test_any_text_is_a_duration_or_a_clear_refusal(text: str) -> None:
    with suppress(InvalidInput):
        assert durations.parse(text) >= 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("2h", 7200),
        ("7d", 604800),
        ("1h30m", 5400),
        ("0", 0),
        ("45", 45),
        (" 2H ", 7200),
        ("1w", 604800),
        ("1w1d", 691200),
    ],
)
def test_usual_notations_of_durations_are_understood(text: str, seconds: int) -> None:
    assert durations.parse(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5s", "5 s", "1.5h", "30m2h", "1d1w", "2 hours", "٣s", "9" * 40])
def test_other_texts_are_refused_as_durations(text: str) -> None:
    with pytest.raises(InvalidInput):
        durations.parse(text)


@pytest.mark.parametrize("text", ["0", "59s", "31d", "5w"])
def test_a_duration_out_of_its_bounds_is_refused_with_the_bounds_in_words(text: str) -> None:
    with pytest.raises(InvalidInput, match=f"^--ttl is {text} but must be at least 1m and at most 30d$"):
        durations.within(text, "--ttl", 60, 30 * 86400)
    assert durations.within("60", "--ttl", 60, 30 * 86400) == 60
    assert durations.within("30d", "--ttl", 60, 30 * 86400) == 30 * 86400


@given(st.floats(min_value=0, max_value=10**8))
def test_a_rough_duration_is_short(seconds: float) -> None:
    assert len(durations.rough(seconds)) <= 7


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7140, "119 min"), (7200, "2 h"), (86399.5, "24 h"), (200000, "2 d")],
)
def test_a_rough_duration_has_the_unit_that_fits(seconds: int, text: str) -> None:
    assert durations.rough(seconds) == text
