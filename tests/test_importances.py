"""Reference: a planted surface, whose shares of variance are known from its values over the whole grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import Params, draw, everything, planted, sweep, trial
from test_analyze import folder_with

from neo_ray import importances
from neo_ray.analyze import analyse
from neo_ray.evidence import gather
from neo_ray.figures import importances as chart
from neo_ray.importances import Importances, Share, importance_lines, importances_of, lacking
from neo_ray.records import TrialRecord

RANKS, RATES = (4, 8, 16, 32, 64), np.geomspace(1e-4, 1e-2, 41)


def ridge(params: Params) -> float:
    """The best learning rate falls with rank; alpha and kd_ratio do nothing."""
    x, z = math.log10(params["learning_rate"]) + 3, math.log2(params["rank"] / 16)
    return 4.6 + 0.15 * (x + 0.25 * z) ** 2 - 0.01 * z


def truth() -> tuple[float, float]:
    """Shares of learning rate (in its logarithm) and rank."""
    values = np.array([[ridge({"rank": r, "learning_rate": x}) for x in RATES] for r in RANKS])
    return values.mean(axis=0).var() / values.var(), values.mean(axis=1).var() / values.var()


def found(records: list[TrialRecord], **changes: Any) -> dict[str, Share]:
    told = importances_of(gather(records, sweep(**changes)))
    assert told is not None
    return {share.axis: share for share in told.shares}


def pruned(num: int, seed: int, quantile: float = 0.4) -> list[TrialRecord]:
    """Trials one after the other; those worse than the quantile of what a rung has seen are stopped there."""
    rng, seen, records = np.random.default_rng(seed), {1: [], 2: []}, []  # type: ignore[var-annotated]
    for i, params in enumerate(draw(num, seed)):
        end = ridge(params) + 0.01 * rng.standard_normal()
        values = {k: end + 0.5**k + 0.02 * rng.standard_normal() for k in (1, 2, 3)}
        curve = [{"rung": k, "step": 5 * k, "tokens": 1000 * k, "select_ce": value} for k, value in values.items()]
        stop = None
        for k, earlier in seen.items():
            earlier.append(values[k])
            if len(earlier) > 5 and values[k] > np.quantile(earlier, quantile):
                stop = k
                break
        state: dict[str, Any] = {"curve": curve[:stop], "state": "PRUNED" if stop else "COMPLETE"}
        records.append(trial(f"t{i:03d}", params, values[stop] if stop else end, **state))
    return records


def test_planted_shares_are_found_in_log_space_and_the_rest_is_interaction() -> None:
    records = planted(draw(96, 1), ridge, noise=0.01)
    told = importances_of(gather(records, sweep()))
    assert told is not None and told.logs == ("learning_rate",) and told.num_settings == 96
    shares = {share.axis: share for share in told.shares}
    rate, rank = truth()
    assert shares["learning_rate"].share == pytest.approx(rate, abs=0.12)
    for share, true in ((shares["learning_rate"], rate), (shares["rank"], rank)):
        assert share.interval[0] <= true <= share.interval[1]
    assert told.interaction == pytest.approx(1 - rate - rank, abs=0.12) and told.interaction > 0.3
    assert shares["learning_rate"].tells and not shares["alpha"].tells and not shares["kd_ratio"].tells
    assert told.shares[0].axis == "learning_rate"


def test_an_inert_axis_stays_inside_its_permutation_interval_under_heavy_pruning() -> None:
    shares = []
    for seed in range(5):
        records = pruned(96, seed)
        assert sum(r.state == "PRUNED" for r in records) > 50
        shares.append(found(records))
        assert shares[-1]["learning_rate"].tells
    assert sum(each[axis].tells for each in shares for axis in ("alpha", "kd_ratio")) <= 1
    assert np.mean([each["learning_rate"].share for each in shares]) == pytest.approx(truth()[0], abs=0.15)


def test_what_pruned_and_diverged_trials_stand_with_is_said() -> None:
    lines = " ".join(importance_lines(importances_of(gather(everything(), None))))
    assert "10 PRUNED trials stand with" in lines and "2 that diverged stand with" in lines and "4 without a value" in lines
    kept = [r for r in everything() if r.state == "COMPLETE"]
    lines = " ".join(importance_lines(importances_of(gather(kept, None))))
    assert lines and not any(word in lines for word in ("PRUNED", "diverged", "left out"))


def test_a_diverged_trial_stands_with_the_worst_value_and_a_pruned_one_no_better_than_the_median() -> None:
    records = planted(draw(20, 0), ridge, noise=0.0)
    ends = [r.metrics["select_ce"] or 0.0 for r in records]
    curve = [{"rung": 1, "select_ce": min(ends) + 0.2}]
    records.append(trial("stopped", draw(1, 7)[0], min(ends) + 0.2, state="PRUNED", curve=curve))
    records.append(trial("lost", draw(1, 8)[0], None, state="FAILED", cause="diverged", metrics={}))
    values = importances._valued(gather(records, sweep())).set_index("id")["gain"]
    assert values["lost"] == pytest.approx(-max(ends)) and values["stopped"] == pytest.approx(-np.median(ends))
    curve[0]["select_ce"] = 4.95
    records[-2] = trial("stopped", draw(1, 7)[0], 4.95, state="PRUNED", curve=curve)
    values = importances._valued(gather(records, sweep())).set_index("id")["gain"]
    assert values["stopped"] == pytest.approx(-4.75), "the curves of the others fall by 0.2 after this rung"


def test_more_settings_than_can_be_used_are_sampled_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importances, "MAX_SETTINGS", 40)
    told = importances_of(gather(planted(draw(96, 1), ridge), sweep()))
    assert told is not None and (told.num_sampled, told.num_settings) == (40, 96)
    assert "a random 40 of 96 settings" in importance_lines(told)[-1]


def test_without_enough_settings_or_axes_there_is_no_sentence_but_a_reason(tmp_path: Path) -> None:
    few = gather(planted(draw(12, 0), ridge), sweep())
    assert importances_of(few) is None and "16 are the least" in (lacking(few) or "")
    one = gather(planted([{"learning_rate": float(x)} for x in RATES], lambda p: p["learning_rate"]), None)
    assert importances_of(one) is None and "two axes" in (lacking(one) or "")
    assert importance_lines(None) == []
    analysis = analyse(folder_with(tmp_path, list(few.records)))
    assert "importances" not in analysis.aspects


def test_the_chart_has_a_row_a_share_and_their_intervals(tmp_path: Path) -> None:
    analysis = analyse(folder_with(tmp_path, everything()))
    told: Importances = analysis.aspects["importances"].found
    (panel,) = chart(analysis).panels
    shuffled, points = panel.layers
    assert [text for _, text in panel.y.ticks] == ["interactions and noise", *(s.axis for s in reversed(told.shares))]
    assert points.x == (told.interaction, *(s.share for s in reversed(told.shares)))  # type: ignore[union-attr]
    assert points.spread[1:] == tuple(s.interval for s in reversed(told.shares))  # type: ignore[union-attr]
    assert shuffled.x == tuple(s.inert for s in reversed(told.shares))  # type: ignore[union-attr]
