"""Does each claim come from the phase that can carry it? On made-up studies whose truth is planted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import sweep, trial

from neo_ray.analyze import analyse, guidelines_json
from neo_ray.confirmed import confirmed, paired, with_all_seeds
from neo_ray.evidence import gather, unit_of, with_unit
from neo_ray.guidelines import derive
from neo_ray.loading import dump
from neo_ray.phase_text import confirmed_lines, phase_lines
from neo_ray.records import TrialRecord, write_records
from neo_ray.report import best_yaml, evidence_line, markdown, trials_table

SEARCH = {"rank": {"choice": [4, 16, 64]}, "learning_rate": {"choice": [2e-4, 1e-3, 5e-3]}}
PHASES: dict[str, Any] = {"map": {}, "exploit": {}, "confirm": {"top": 2, "seeds": [11, 12, 13]}}
REFERENCE = {"rank": 64, "learning_rate": 2e-4}
GOOD = {"rank": 16, "learning_rate": 1e-3}
LUCKY = {"rank": 4, "learning_rate": 5e-3}
STUDY = sweep(search=SEARCH, phases=PHASES, sampler={})


def run(number: int, params: dict[str, Any], phase: str, seed: int, select: float, report: float, **fields: Any) -> TrialRecord:
    metrics = {"select_ce": select, "report_ce": report}
    untrained = {"baseline": {"select_ce": 8.0, "report_ce": 8.0}}  # no run of these diverged
    return trial(f"{number:04d}", params, select, phase=phase, seed=seed, metrics=metrics, **{"details": untrained, **fields})


def records(gain: float = 0.05) -> list[TrialRecord]:
    """LUCKY looks best in the map; with fresh seeds GOOD is `gain` better than the reference on the report split."""
    rng = np.random.default_rng(3)
    found = [run(0, LUCKY, "map", 0, 3.0, 3.0), run(1, GOOD, "map", 0, 4.0, 4.0), run(2, REFERENCE, "map", 0, 4.5, 4.5)]
    for seed, common in zip((11, 12, 13), rng.normal(0, 0.3, 3), strict=True):  # what all runs with one seed share
        for params, level in ((REFERENCE, 4.5), (LUCKY, 4.6), (GOOD, 4.5 - gain)):
            noise = rng.normal(0, 0.002)
            found.append(run(len(found), params, "confirm", seed, level + common + noise, level + common - noise))
    return found


def test_the_best_is_the_confirmed_one_and_its_gain_is_taken_seed_by_seed() -> None:
    found = confirmed(records(), STUDY, "select_ce", "min")
    assert found is not None and found.params == GOOD and found.seeds == (11, 12, 13) and found.num_settings == 3
    assert found.metric == "report_ce" and not found.is_reference
    assert found.gain == pytest.approx(0.05, abs=0.01), "though runs differ by 0.3 from seed to seed"
    assert found.interval is not None and 0.02 < found.interval[0] < 0.05 < found.interval[1] < 0.08
    evidence = gather(records(), STUDY)
    assert evidence.best is not None and (evidence.best.id, evidence.best.num_seeds) in {(i, 3) for i in found.trials}
    assert "settles it" in confirmed_lines(evidence)[1] and "does not settle" not in confirmed_lines(evidence)[1]
    assert "does not settle it" in confirmed_lines(gather(records(0.001), STUDY))[1]


def test_the_interval_is_that_of_the_paired_t() -> None:
    from scipy import stats

    differences = [0.1, 0.2, 0.4, 0.3]
    mean, interval = paired(differences)
    assert mean == pytest.approx(0.25)
    assert interval == pytest.approx(tuple(stats.ttest_1samp(differences, 0).confidence_interval(0.95)))
    assert paired(differences, 3)[1][0] < interval[0]


def test_only_settings_with_the_same_seeds_are_held_against_each_other() -> None:
    whole = records()
    part = [r for r in whole if not (r.params == GOOD and r.seed in (12, 13))]
    assert names(with_all_seeds(part, STUDY, "select_ce")) == {"reference": [11, 12, 13], "lucky": [11, 12, 13]}
    assert confirmed_lines(gather(part, STUDY))[-1] == (
        "Not among them, as it diverged or is not COMPLETE with all 3 of these seeds: rank 16, learning_rate 1e-3 (has 1)"
    )
    assert with_all_seeds([r for r in whole if r.seed in (0, 11)], STUDY, "select_ce") == {}, "one seed confirms nothing"
    assert confirmed(whole[:3], STUDY, "select_ce", "min") is None
    assert gather(whole[:3], STUDY).best.id == "0000"  # type: ignore[union-attr]
    unknown = confirmed(whole, None, "select_ce", "min")
    assert unknown is not None and unknown.gain is None, "which setting is the reference stands in the sweep file"


def names(groups: dict[str, list[TrialRecord]]) -> dict[str, list[int]]:
    """Setting → its seeds."""
    called = {"reference": REFERENCE, "lucky": LUCKY, "good": GOOD}
    return {n: [r.seed for r in runs] for runs in groups.values() for n, params in called.items() if runs[0].params == params}


ALL = ("reference", "lucky", "good")


@pytest.mark.parametrize(
    ("count", "settings", "seeds"),
    [
        *((count, (), ()) for count in (0, 1, 2, 3, 4)),
        (5, ("reference", "lucky"), (11, 12)),
        *((count, ALL, (11, 12)) for count in (6, 7, 8)),
        (9, ALL, (11, 12, 13)),
    ],
)
@pytest.mark.parametrize("running", [False, True])
def test_wherever_a_confirm_stands_the_reference_does_not_win_by_being_first(
    count: int, settings: tuple[str, ...], seeds: tuple[int, ...], running: bool
) -> None:
    """Seed by seed, the reference first: it is always ahead by a seed."""
    whole = records()
    part = whole[: 3 + count] + [r.model_copy(update={"state": "RUNNING", "metrics": {}}) for r in whole[3 + count :][:running]]
    assert names(with_all_seeds(part, STUDY, "select_ce")) == {name: list(seeds) for name in settings}
    found, best = confirmed(part, STUDY, "select_ce", "min"), gather(part, STUDY).best
    assert (found is None) == (not settings) and best is not None
    params = next(r.params for r in part if r.id == best.id)
    assert params == found.params if found else params != REFERENCE
    if settings == ALL:
        assert params == GOOD and found is not None and found.gain is not None and not found.left_out


def test_added_and_replaced_seeds_count_once_all_settings_have_them() -> None:
    old = records()
    later = [r.model_copy(update={"id": f"{int(r.id) + 20:04d}", "seed": r.seed + 10}) for r in old[3:]]
    for count in range(1, 9):
        found = with_all_seeds([*old, *later[:count]], STUDY, "select_ce")
        assert names(found) == dict.fromkeys(ALL, [11, 12, 13, 21, 22][: 3 + count // 3])
    other = {"rank": 64, "learning_rate": 1e-3}
    renamed = [r.model_copy(update={"params": other}) if r.params == LUCKY else r for r in later]
    found = with_all_seeds([*old, *renamed], STUDY, "select_ce")
    assert {runs[0].params["rank"] for runs in found.values()} == {16, 64} and len(found) == 3
    assert {tuple(r.seed for r in runs) for runs in found.values()} == {(21, 22, 23)}, "as many as have 11, 12, 13, and newer"


def test_a_setting_that_diverged_with_a_fresh_seed_is_not_recommended() -> None:
    broken = {"state": "FAILED", "cause": "diverged", "metrics": {}}
    part = [r.model_copy(update=broken) if r.params == GOOD and r.seed == 13 else r for r in records()]
    found = confirmed(part, STUDY, "select_ce", "min")
    assert found is not None and found.params == REFERENCE and found.seeds == (11, 12, 13)
    assert found.left_out == ((GOOD, (11, 12)),)
    alone = [r.model_copy(update=broken) if r.phase == "confirm" and r.params != REFERENCE else r for r in records()]
    assert names(with_all_seeds(alone, STUDY, "select_ce")) == {"reference": [11, 12, 13]}, "none of the others is on its way"
    lost = [r.model_copy(update=broken) if r.phase == "confirm" and r.params == REFERENCE else r for r in records()]
    assert names(with_all_seeds(lost, STUDY, "select_ce")) == {"lucky": [11, 12, 13], "good": [11, 12, 13]}


def test_benchmarks_are_judged_by_the_items_that_chose_and_that_is_said() -> None:
    study = sweep(search=SEARCH, phases=PHASES, sampler={}, objective={"metric": "suite"}, evaluation={"suite": "quickstart"})
    scored = [r.model_copy(update={"metrics": {"suite": 0.8 - 0.1 * (r.metrics["select_ce"] or 0.0)}}) for r in records()]
    evidence = gather(scored, study)
    lines = confirmed_lines(evidence)
    assert "rank 16, learning_rate 1e-3: suite 0.3" in lines[0] and lines[0].endswith(" on average")
    assert "suite has no report split" in lines[-1] and "only the seeds are fresh" in lines[-1]
    assert not any("report split" in line for line in confirmed_lines(gather(records(), STUDY)))
    text = "\n".join([*lines, *(evidence_line(guideline) for guideline in derive(scored, study))])
    assert "suite suite" not in text and not re.search(r"\d suite", text) and "  " not in text and " ," not in text
    assert [unit_of(metric) for metric in ("suite", "suite_ce", "report_ce")] == ["", "", "nats per token"]
    assert with_unit("0.2293", "suite_x") == "0.2293"
    assert (evidence.named("suite"), evidence.named("select_kl")) == ("suite", "select_kl (nats per token)")


def test_a_reference_that_is_best_is_said_to_be() -> None:
    found = gather(records(-0.5), STUDY)
    assert confirmed_lines(found)[0].startswith(
        "Of 3 settings that ran again with 3 fresh seeds (11, 12, 13), the best is rank 64"
    )
    assert "the reference itself" in confirmed_lines(found)[0] and len(confirmed_lines(found)) == 1


def test_laws_come_from_the_map_and_not_from_what_a_sampler_chose() -> None:
    """The map says that rank does nothing; the sampler has gathered good trials at rank 64 alone."""
    ranks, rates = (4, 16, 64), (2e-4, 1e-3, 5e-3)
    rng = np.random.default_rng(0)
    mapped = [
        run(i, {"rank": rank, "learning_rate": rate}, "map", seed, value, value)
        for i, (rank, rate, seed) in enumerate((r, x, s) for r in ranks for x in rates for s in (0, 1))
        for value in [4.5 + 0.01 * float(rng.standard_normal())]
    ]
    chosen = [run(100 + i, {"rank": 64, "learning_rate": rates[i % 3]}, "exploit", 0, 3.9, 3.9) for i in range(12)]
    (law,) = [g for g in derive([*mapped, *chosen], STUDY) if g.hypothesis == "select_ce depends on rank"]
    assert law.verdict == "undecided" and set(law.trials) == {r.id for r in mapped}
    renamed = [r.model_copy(update={"phase": "explore"}) for r in [*mapped, *chosen]]
    (biased,) = [g for g in derive(renamed, None) if g.hypothesis == "select_ce depends on rank"]
    assert biased.effect is not None and biased.effect > 10 * abs(law.effect or 0.0), "what the phases keep apart"
    lines = phase_lines(gather([*mapped, *chosen], STUDY))
    assert lines[:2] == ["map: 18 trials (18 COMPLETE)", "exploit: 12 trials (12 COMPLETE)"]
    assert lines[2] == "effects of axes come from map; scores chose the settings of exploit"
    assert phase_lines(gather(mapped, STUDY)) == []


def test_the_report_shows_phases_and_what_was_confirmed(tmp_path: Path) -> None:
    write_records(tmp_path, records())
    (tmp_path / "sweep.yaml").write_text(dump(STUDY))
    analysis = analyse(tmp_path)
    text = markdown(analysis)
    assert "## Phases" in text and "## Confirmed" in text and "- map: 3 trials" in text
    columns, rows = trials_table(records())
    assert columns[:3] == ("trial", "state", "phase") and {row[2] for row in rows} == {"map", "confirm"}
    assert "phase" not in trials_table(records()[:3])[0]
    data = json.loads(guidelines_json(analysis))
    assert data["confirmed"]["params"] == GOOD and data["best"]["params"] == GOOD
    plain = [r.model_copy(update={"phase": "map"}) for r in records()]
    write_records(tmp_path, plain)
    assert "## Confirmed" not in markdown(analyse(tmp_path)) and "## Phases" not in markdown(analyse(tmp_path))


def test_the_winners_own_file_is_a_sweep_of_one_trial(tmp_path: Path) -> None:
    from neo_ray.loading import load
    from neo_ray.phases import phases_of

    (tmp_path / "best.yaml").write_text(best_yaml(STUDY, records()[1]))
    (phase,) = phases_of(load(tmp_path / "best.yaml"))
    assert phase.most() == 1 and phase.name is None
