"""Any clocks of an operator: accepted ones are safe, and unsafe ones are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from orion.manager.domain.clocks import DRIFT, Clocks
from orion.manager.settings import Settings

AROUND_THE_DEFAULTS = st.builds(
    Clocks,
    heartbeat_s=st.floats(1, 40),
    suspect_after_s=st.floats(30, 80),
    freeze_after_s=st.floats(60, 90),
    freeze_budget_s=st.floats(0.1, 8),
    door_answer_s=st.floats(0.1, 8),
    takeover_after_s=st.floats(70, 120),
    slack_s=st.floats(0.1, 5),
)


@st.composite
def safe_clocks(draw: st.DrawFn) -> Clocks:
    """Return clocks that fulfil the inequalities, with a takeover up to 0.1 % above the least that they allow."""
    heartbeat, factor = draw(st.floats(0.1, 100)), st.floats(1.01, 3)
    suspect = heartbeat * 1.1 * draw(factor)
    freeze = suspect * draw(factor)
    door, budget, slack = (draw(st.floats(0.01, 20)) for _ in range(3))
    least = ((freeze + door + budget) * (1 + DRIFT) + slack) / (1 - DRIFT)
    return Clocks(
        heartbeat_s=heartbeat,
        suspect_after_s=suspect,
        freeze_after_s=freeze,
        freeze_budget_s=budget,
        door_answer_s=door,
        slack_s=slack,
        takeover_after_s=least * draw(st.floats(1.00001, 1.001)),
    )


SAFE = safe_clocks()


@given(AROUND_THE_DEFAULTS | SAFE, st.floats(-DRIFT, DRIFT), st.floats(-DRIFT, DRIFT))
@example(Clocks(), DRIFT, -DRIFT)
def test_with_accepted_clocks_a_worker_has_stopped_before_it_is_replaced(
    clocks: Clocks, slow: float, fast: float
) -> None:
    assume(not clocks.problems())
    # The agent's seconds are longer by its drift, the manager's shorter. Its lease began when it sent, which is
    # before the manager received, so zero travelling time is the worst.
    stopped_at = (clocks.freeze_after_s + clocks.door_answer_s + clocks.freeze_budget_s) * (1 + slow)
    replaced_at = clocks.takeover_after_s * (1 + fast)
    assert stopped_at + clocks.slack_s <= replaced_at + 1e-9


@given(AROUND_THE_DEFAULTS)
def test_the_settings_take_exactly_the_clocks_that_are_safe_and_say_what_is_wrong_with_others(clocks: Clocks) -> None:
    values: dict[str, Any] = vars(clocks)
    problems = clocks.problems()
    if not problems:
        assert Settings(**values).clocks == clocks
        return
    with pytest.raises(ValidationError) as refused:
        Settings(**values)
    assert problems[0] in str(refused.value)


@given(SAFE, st.floats(0.01, 10))
def test_scaling_keeps_safe_clocks_safe(clocks: Clocks, factor: float) -> None:
    assert clocks.scaled(factor).problems() == []
