"""Is every sentence of a report computed? Reference: reports of records from which the data behind a sentence was taken away."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from planted import everything, sweep

from neo_ray.analyze import analyse
from neo_ray.config import SweepConfig
from neo_ray.loading import dump
from neo_ray.records import TrialRecord, write_records
from neo_ray.report import Analysis, markdown

Records = list[TrialRecord]


def phased() -> Records:
    """The sweep that has everything, in phases, the best two settings confirmed."""
    records = [r.model_copy(update={"phase": "map" if r.seed == 0 else "noise"}) for r in everything()]
    best = sorted((r for r in records if r.state == "COMPLETE"), key=lambda r: r.metrics["select_ce"] or 0.0)[:2]
    for runner in best:
        for seed in (101, 102, 103):
            metrics = {**runner.metrics, "report_ce": (runner.metrics["select_ce"] or 0.0) + seed / 1e5}
            fresh = {"id": f"c{runner.id}-{seed}", "phase": "confirm", "seed": seed, "metrics": metrics}
            records.append(runner.model_copy(update=fresh))
    return records


def several() -> SweepConfig:
    objective = [{"metric": name} for name in ("select_ce", "accelerator_seconds", "peak_memory_bytes")]
    search = {
        "rank": {"choice": [4, 8, 16, 32, 64]},
        "learning_rate": {"log_uniform": [1e-4, 1e-2]},
        "kd_ratio": {"choice": [0, 0.5]},
    }
    return sweep(objective=objective, search=search)


def analysis_of(records: Records, folder: Path, config: SweepConfig | None = None) -> Analysis:
    write_records(folder, records)
    (folder / "sweep.yaml").unlink(missing_ok=True)
    if config is not None:
        (folder / "sweep.yaml").write_text(dump(config), encoding="utf-8")
    return analyse(folder)


@cache
def whole() -> tuple[TrialRecord, ...]:
    return tuple(phased())


def test_without_the_trials_that_it_names_no_guideline_is_written(tmp_path: Path) -> None:
    records = list(whole())
    before = analysis_of(records, tmp_path)
    report = markdown(before)
    backed = [g for g in before.guidelines if g.trials]
    assert {g.verdict for g in backed} >= {"supported", "undecided"} and len(backed) > 4
    assert all(g.verdict == "undecided" for g in before.guidelines if not g.trials)  # of what was not tested
    for trials in {g.trials for g in backed}:
        rest = [r for r in records if r.id not in trials]
        after = markdown(analysis_of(rest, tmp_path)) if rest else ""
        for guideline in backed:
            if guideline.trials == trials:
                claim = line_with(report, guideline.claim)
                assert claim not in after, f"{guideline.claim}: stands without its {len(trials)} trials"


def line_with(report: str, text: str) -> str:
    """The line of the report that has a claim, which is escaped there."""
    plain = {line.replace("\\", ""): line for line in report.splitlines()}
    return next(line for known, line in plain.items() if text.replace("\\", "") in known)


def without(state: str) -> Callable[[Records], Records]:
    return lambda records: [r for r in records if r.state != state]


def changed(**fields: object) -> Callable[[Records], Records]:
    return lambda records: [r.model_copy(update=fields) for r in records]


def lacking(axis: str) -> Callable[[Records], Records]:
    return lambda records: [r.model_copy(update={"params": {k: v for k, v in r.params.items() if k != axis}}) for r in records]


TAKEN: dict[str, tuple[str, Callable[[Records], Records]]] = {
    "phases": ("## Phases", changed(phase="map")),
    "confirmed trials": ("## Confirmed", lambda records: [r for r in records if r.phase != "confirm"]),
    "costs": ("beaten by no other", changed(accelerator_seconds=0.0, peak_memory_bytes=0)),
    "complete trials": ("## Guidelines", without("COMPLETE")),
    "one of the two axes": ("## Rank × learning rate", lacking("rank")),
    "curves": ("## Learning curves", changed(curve=[])),
    "failures": ("## Failures by cause", without("FAILED")),
    "seeds": ("Noise of a run in select_ce: standard deviation", changed(seed=0)),
    "what was pruned": (" PRUNED", without("PRUNED")),
    "what diverged": (" diverged (NaN", lambda records: [r for r in records if r.cause != "diverged"]),
    "the winner": ("Trial c", lambda records: [r for r in records if r.phase != "confirm"]),
}


@pytest.mark.parametrize("what", TAKEN)
def test_without_its_data_a_section_or_sentence_is_gone(what: str, tmp_path: Path) -> None:
    text, take = TAKEN[what]
    records = list(whole())
    assert text in markdown(analysis_of(records, tmp_path, several()))
    assert text not in markdown(analysis_of(take(records), tmp_path, several()))
