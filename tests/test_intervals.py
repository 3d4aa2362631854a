"""Do an interval and its standard error give one another? References: textbook quantiles, a sample of known spread."""

from __future__ import annotations

import numpy as np
import pytest

from neo_ray.intervals import error_of, half_width, percentiles


def test_half_widths_are_those_of_the_tables() -> None:
    assert half_width() == pytest.approx(1.959964, abs=1e-6)
    assert half_width(2) == pytest.approx(4.302653, abs=1e-6)
    assert half_width(choices=5) == pytest.approx(2.575829, abs=1e-6)


@pytest.mark.parametrize(("df", "choices"), [(None, 1), (3, 1), (3, 4)])
def test_the_error_is_the_one_that_the_interval_was_made_from(df: int | None, choices: int) -> None:
    half = 0.7 * half_width(df, choices)
    assert error_of((1 - half, 1 + half), df, choices) == pytest.approx(0.7)


def test_draws_leave_a_fortieth_on_either_side() -> None:
    assert percentiles(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
