"""The step plan: what every rank sees, and when evaluation falls."""

from __future__ import annotations

import numpy as np
import pytest

from neo_ray.batches import accumulation_steps, learning_rate, plan_steps
from neo_ray.settings import TrainingConfig

TOKENS = np.random.default_rng(0).integers(5, 50, size=37)
LABELS = TOKENS - 1


def test_every_example_is_seen_once_an_epoch() -> None:
    plan = plan_steps(TOKENS, LABELS, TrainingConfig(epochs=2, batch_size=5), points=4, seed=3)
    assert np.bincount(plan.order).tolist() == [2] * 37
    assert plan.labels.sum() == 2 * LABELS.sum()
    assert plan.tokens[-1] == 2 * TOKENS.sum()


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (2, 2), (3, 1), (1, 8)])
def test_ranks_and_micro_batches_share_out_a_step_exactly(world_size: int, micro: int) -> None:
    plan = plan_steps(TOKENS, LABELS, TrainingConfig(epochs=1, batch_size=8), points=2, seed=0)
    for step in range(plan.num_steps):
        shares = [plan.micro_batches(step, rank, world_size, micro, TOKENS) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1, "every rank runs equally many micro-batches"
        seen = np.sort(np.concatenate([batch for share in shares for batch in share]))
        assert seen.tolist() == np.sort(plan.order[plan.starts[step] : plan.starts[step + 1]]).tolist()


def test_a_data_set_smaller_than_a_batch_has_the_micro_batches_that_the_engine_counts() -> None:
    training = TrainingConfig(epochs=1, batch_size=64)
    plan = plan_steps(TOKENS, LABELS, training, points=1, seed=0)
    assert plan.num_steps == 1
    for world_size, micro in ((1, 1), (2, 4)):
        batches = plan.micro_batches(0, 0, world_size, micro, TOKENS)
        assert len(batches) == accumulation_steps(training.batch_size, world_size, micro)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_rungs_stand_at_the_same_token_counts_for_every_batch_size(batch_size: int) -> None:
    plan = plan_steps(TOKENS, LABELS, TrainingConfig(tokens=3000, batch_size=batch_size), points=4, seed=0)
    assert plan.rung_tokens == (750.0, 1500.0, 2250.0, 3000.0)
    due = {plan.due(step): step for step in range(plan.num_steps) if plan.due(step)}
    assert max(due) == 4 and due[4] == plan.num_steps - 1
    for rung, step in due.items():
        assert plan.tokens[step] >= plan.rung_tokens[rung - 1]
    assert plan.tokens[-1] >= 3000 > (plan.tokens[-2] if plan.num_steps > 1 else 0)


def test_the_order_depends_on_the_seed_alone() -> None:
    training = TrainingConfig(steps=9, batch_size=4)
    first, again, other = (plan_steps(TOKENS, LABELS, training, 3, seed).order.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_the_rate_warms_up_and_falls_to_nothing_over_the_full_length() -> None:
    training = TrainingConfig(learning_rate=1.0, warmup_ratio=0.2, schedule="cosine")
    rates = [learning_rate(training, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
