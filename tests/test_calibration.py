"""Reference: planted truth. A small version of what docs/statistics.md tells of 200 sweeps of each kind, as tests/calibration.py
measures it; the bound is one that right intervals fall below once in a thousand runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calibration import BEGIN, END, NOTHING, ROOT, STUDIES, Truth, events, fitted, measured, records, table
from scipy import stats

from neo_ray.analyze import analyse
from neo_ray.records import load_records

FEW = 12


@pytest.mark.parametrize("name", ["grid", "effects", "nothing", "arms", "inert", "edge"])
def test_intervals_hold_the_planted_truth(name: str) -> None:
    least = int(stats.binom.ppf(0.001, FEW, STUDIES[name].promised))
    for question, (hits, num) in measured(name, FEW, first=1000).items():
        assert num == FEW and hits >= least, f"{question}: {hits} of {num}, and {least} are the least"


def test_the_page_is_what_was_measured() -> None:
    results = json.loads((ROOT / "docs" / "calibration.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == table(results).strip()
    assert set(results) == set(STUDIES)
    for name, counts in results.items():
        for question, (hits, num) in counts.items():
            assert num >= 200, f"{name}, {question}: only {num} sweeps"
            assert hits / num >= STUDIES[name].promised, f"{name}, {question}: {hits} of {num}"


@pytest.mark.parametrize(
    ("alpha_rule", "said"),
    [(lambda rank: 2.0 * rank, "ln scaling: 2 at every rank"), (lambda rank: 32.0, "ln scaling: moves with ln rank")],
    ids=["alpha is twice the rank", "alpha is 32"],
)
def test_what_an_alpha_rule_makes_collinear_is_dropped_and_named(alpha_rule: object, said: str) -> None:
    found = fitted(Truth(alpha_rule=alpha_rule), 0, phases=("noise", "map"))  # type: ignore[arg-type]
    assert any(text.startswith(said) for text in found.surface.dropped) and said in found.law.note
    assert "scaling" not in found.surface.coordinates and found.law.gamma is not None
    assert found.law.alpha_rule and "scaling" in found.law.alpha_rule


def test_laws_are_fitted_on_what_no_sampler_chose() -> None:
    chosen = {r.id for r in records(Truth(), 3) if r.phase == "exploit"}
    found = fitted(Truth(), 3)
    assert len(chosen) == 24 and not chosen & set(found.law.ids)
    assert any(r.state == "PRUNED" for r in found.evidence.records if r.id in chosen)


def test_a_synthetic_study_is_the_same_through_the_files_of_a_sweep(tmp_path: Path) -> None:
    written = events(Truth(), 0)
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in written), encoding="utf-8")
    assert load_records(tmp_path) == records(Truth(), 0)
    axes = {g.axis for g in analyse(tmp_path).guidelines if g.verdict == "supported"}
    assert {"rank", "learning_rate"} <= axes and "warmup_ratio" not in axes


def test_pure_noise_has_no_law() -> None:
    found = fitted(NOTHING, 0)
    assert found.law.gamma is None and "carries no law" in found.law.note
