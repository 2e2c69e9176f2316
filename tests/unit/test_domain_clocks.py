"""The inequalities between the clocks, which prevent two live copies of a rental."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from orion.manager.domain.clocks import Clocks


@pytest.mark.parametrize("factor", [1, 0.1, 0.02, 10])
def test_the_defaults_are_safe_at_every_scale(factor: float) -> None:
    assert Clocks().scaled(factor).problems() == []


def test_all_clocks_scale_together() -> None:
    scaled = Clocks().scaled(0.1)
    for field in fields(Clocks):
        assert getattr(scaled, field.name) == pytest.approx(getattr(Clocks(), field.name) / 10)


@pytest.mark.parametrize("name", [field.name for field in fields(Clocks)])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_clock_that_is_not_positive_is_refused_by_name(name: str, value: float) -> None:
    assert f"{name} must be positive" in replace(Clocks(), **{name: value}).problems()


def test_a_takeover_that_may_come_before_the_freeze_is_refused_with_both_figures() -> None:
    (problem,) = replace(Clocks(), takeover_after_s=89.0).problems()
    assert "may run until 88.85 s" in problem
    assert "replaced after 88.11 s" in problem
    assert "raise takeover_after_s or lower freeze_after_s" in problem


@pytest.mark.parametrize(
    "change",
    [{"suspect_after_s": 33.0}, {"suspect_after_s": 75.0}, {"heartbeat_s": 36.4}],
    ids=["suspect before a late heartbeat", "suspect not before freeze", "heartbeat too slow"],
)
def test_clocks_out_of_order_are_refused(change: dict[str, float]) -> None:
    (problem,) = replace(Clocks(), **change).problems()
    assert "heartbeat_s * 1.1 < suspect_after_s < freeze_after_s must hold" in problem
