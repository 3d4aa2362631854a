"""Paired differences on planted items: the interval covers the truth, and equal models are told apart as often as stated."""

from __future__ import annotations

import numpy as np
import pytest

from neo_ray.paired import compare


def test_a_difference_is_of_averages_over_benchmarks() -> None:
    found = compare({"long": [1, 1, 1, 0], "short": [0, 1]}, {"long": [1, 0, 1, 1], "short": [0, 0]})
    assert found.value == pytest.approx((0.0 + 0.5) / 2)
    assert (found.better, found.worse) == (2, 1) and found.p == pytest.approx(0.75, abs=0.03)  # 6 of the 8 choices of signs


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, hits = np.random.default_rng(1), 0
    for turn in range(200):
        base = generator.random(150) < 0.5
        ours = np.where(generator.random(150) < 0.2, generator.random(150) < 0.8, base)  # 0.2 × (0.8 − 0.5) better
        found = compare({"one": ours.astype(float).tolist()}, {"one": base.astype(float).tolist()}, turn)
        hits += found.low <= 0.06 <= found.high
    assert 180 <= hits <= 199


def test_pairing_is_what_makes_it_narrow() -> None:
    generator = np.random.default_rng(2)
    base = (generator.random(200) < 0.5).astype(float)
    ours = base.copy()
    ours[np.flatnonzero(base == 0)[:12]] = 1
    paired, shuffled = compare({"a": ours}, {"a": base}), compare({"a": ours}, {"a": generator.permutation(base)})
    assert paired.value == shuffled.value == pytest.approx(0.06)
    assert paired.low > 0 > shuffled.low and paired.p < 0.001


def test_equal_models_do_not_differ() -> None:
    found = compare({"a": [1, 0, 1]}, {"a": [1, 0, 1]})
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1.0)


def test_other_items_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same items"):
        compare({"a": [1, 0]}, {"a": [1]})


def test_the_test_is_of_the_average_over_benchmarks_not_of_all_items() -> None:
    """Many items a little worse in one benchmark, few much better in two others: the average is better, and so says p."""
    large, small = np.zeros(14_000), np.zeros(500)
    large[:120], small[:60] = -1, 1
    found = compare({"a": large, "b": small, "c": small}, {"a": 0 * large, "b": 0 * small, "c": 0 * small})
    assert found.value > 0.07 and found.low > 0.06 and found.p < 0.001


def test_equal_models_are_told_apart_as_seldom_as_the_level_says() -> None:
    generator, found = np.random.default_rng(3), 0
    for turn in range(200):
        ours, theirs = ({name: generator.random(size) < 0.5 for name, size in (("a", 80), ("b", 20))} for _ in range(2))
        found += (
            compare({k: v.astype(float) for k, v in ours.items()}, {k: v.astype(float) for k, v in theirs.items()}, turn).p < 0.05
        )
    assert 2 <= found <= 20
