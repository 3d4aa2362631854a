"""Is the loss of the teacher's k likeliest tokens the whole one at k = V, and below it else?

Reference: float64, probabilities of the buckets written out, gradient by autograd; and the dense loss of `losses.neo_loss`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_chunked import DIVERGENCES, LABELS, TEACHER, N, V, a_head, a_loss, compare, dense
from test_stores import CPU, LAYOUTS, Pair, a_recipe, pair, several_shards  # noqa: F401  (fixtures)

from neo_ray import filling, models, stores
from neo_ray.chunked import chunked_loss
from neo_ray.data import collate
from neo_ray.losses import TopK, divergence_sum, scored, top_k
from neo_ray.settings import DistillConfig
from neo_ray.supply import row_bytes


def exact(k: int, temperature: float) -> TopK:
    """Not rounded to fp16."""
    log_p_NV = torch.log_softmax(TEACHER / temperature, dim=-1)
    log_p_NK, ids_NK = log_p_NV.topk(k, dim=-1)
    return TopK(log_p_NK, ids_NK, log_p_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_equals_dense_when_k_is_the_vocabulary(divergence: Any, trained: bool) -> None:
    distill, known = DistillConfig(divergence=divergence, temperature=2.0, kd_ratio=0.5), exact(V, 2.0)
    found = a_loss(lambda s, h: chunked_loss(s, h, LABELS, known.rows, distill, V, rows=7), a_head(trained))
    compare(found, a_loss(dense(distill), a_head(trained)))


@pytest.mark.parametrize("k", [1, 5, V - 1])
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_fewer_tokens_give_a_lower_bound(divergence: Any, k: int) -> None:
    distill, student_NV = DistillConfig(divergence=divergence, temperature=2.0), torch.randn(N, V, generator=torch.manual_seed(0))
    bound, whole = divergence_sum(student_NV, exact(k, 2.0), distill), divergence_sum(student_NV, TEACHER, distill)
    assert 0 < bound <= whole * (1 + 1e-6)
    assert k == V - 1 or bound < 0.99 * whole


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_gradient_is_that_of_the_buckets_also_where_the_tail_is_nearly_empty(scale: float) -> None:
    student_NV = (scale * TEACHER + torch.randn(N, V, generator=torch.manual_seed(0))).requires_grad_()
    known = exact(5, 1.0)
    ours = torch.autograd.grad(divergence_sum(student_NV, known, DistillConfig(temperature=1.0)), student_NV)[0]
    inputs_NV = student_NV.detach().double().requires_grad_()
    log_q_NV, ids_NK = torch.log_softmax(inputs_NV, -1), known.ids_NK
    rest = torch.ones(N, V, dtype=torch.bool).scatter(-1, ids_NK, False)
    log_tail_N1 = torch.stack([row[mask].logsumexp(-1) for row, mask in zip(log_q_NV, rest, strict=True)])[:, None]
    log_q_NB = torch.cat([log_q_NV.gather(-1, ids_NK), log_tail_N1], -1)
    p_NB = torch.cat([known.log_p_NK, known.log_tail_N[:, None]], -1).double().exp()
    theirs = torch.autograd.grad((p_NB * (p_NB.log() - log_q_NB)).sum(), inputs_NV)[0]
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_fp16_costs_less_than_2e_3_nats_a_token() -> None:
    student_NV, distill = torch.randn(N, V, generator=torch.manual_seed(0)), DistillConfig()
    kept, whole = (divergence_sum(student_NV, known, distill) for known in (top_k(TEACHER, 8, 1.0), exact(8, 1.0)))
    assert abs(kept - whole) / N < 2e-3 and kept != whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_store_gives_back_what_the_teacher_says(pair: Pair, tmp_path: Path, layout: str) -> None:  # noqa: F811
    recipe = a_recipe("topk", pair, top_k=6, temperature=2.0)
    teacher = filling.Teacher(recipe, pair.teacher, pair.tokens, pair.pad_id)
    for shard in (cut := stores.shards(pair.tokens, row_bytes("topk", 6))):
        stores.write_shard(tmp_path, shard, teacher.fill(shard))
    store, indices = stores.Store(tmp_path, recipe, pair.tokens, cut), [17, 3, 40]
    batch = collate(pair.tokens.split("train").examples(indices), pair.pad_id, **LAYOUTS[layout])
    given = models.inputs(pair.teacher, batch.input_ids_BL, batch.attention_mask_BL, batch.position_ids_BL)
    with torch.no_grad():
        expected = top_k(scored(pair.teacher(**given).logits, batch.labels_BL, pair.vocabulary), 6, 2.0)
    rows = store.rows("train", indices, CPU)
    assert sum(column[0].numel() * column.element_size() for column in rows) == row_bytes("topk", 6)
    for ours, theirs in zip(rows, (expected.log_p_NK, expected.ids_NK, expected.log_tail_N), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4)
