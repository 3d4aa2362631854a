"""Have the losses of any kind of trial changed? Reference: `golden/curves.json`; `python tests/golden.py` writes it again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import golden
import pytest

from neo_ray.parts import Sources

TOLERANCE = 1e-4  # nats per token: another CPU adds up in another order and differs in the last bits


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    with golden.process_group(golden.CPU):
        yield golden.sources(tmp_path_factory.mktemp("golden"))


def test_every_golden_curve_has_its_trial() -> None:
    assert list(golden.stored()) == list(golden.TRIALS)


def test_no_two_golden_curves_are_the_same() -> None:
    """A setting that had no effect would pass unseen otherwise."""
    for (one, first), (other, second) in itertools.combinations(golden.stored().items(), 2):
        apart = max(abs(a[key] - b[key]) for a, b in zip(first, second, strict=True) for key in golden.KEPT)
        assert apart > 2 * TOLERANCE, f"{one} and {other}"


@pytest.mark.parametrize("name", golden.TRIALS)
def test_the_losses_are_the_golden_ones(name: str, where: Sources) -> None:
    for ours, kept in zip(golden.curve(golden.TRIALS[name], where), golden.stored()[name], strict=True):
        assert ours == pytest.approx(kept, abs=TOLERANCE)
