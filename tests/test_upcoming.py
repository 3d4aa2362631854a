"""Which trials would decide what is open? In planted studies each undecided guideline is asked, or named with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planted import planted, sweep
from test_laws import RATES, grid, truth

from neo_ray.analyze import analyse, write
from neo_ray.drafts import Guideline
from neo_ray.evidence import gather
from neo_ray.guidelines import derive
from neo_ray.hypotheses import fitted
from neo_ray.loading import dump, load
from neo_ray.questions import QUESTIONS
from neo_ray.records import TrialRecord, write_records
from neo_ray.report import markdown
from neo_ray.sweep import main as sweep_main
from neo_ray.upcoming import upcoming


def study(tmp_path: Path, records: list[TrialRecord]) -> Path:
    folder = tmp_path / "results"
    write_records(folder, records)
    config = sweep(search={"rank": {"choice": [4, 8, 16, 32, 64]}, "alpha": {"of": "rank", "times": 2},
                           "learning_rate": {"log_uniform": [1e-4, 1e-2]}, "kd_ratio": {"choice": [0, 0.5, 1]}})  # fmt: skip
    (folder / "sweep.yaml").write_text(dump(config), encoding="utf-8")
    return folder


def test_next_yaml_is_a_sweep_of_what_is_undecided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study(tmp_path, planted(grid(), truth, noise=0.01))
    analysis = analyse(folder)
    assert folder / "next.yaml" in write(analysis, folder)
    first, config = analysis.upcoming[0], load(folder / "next.yaml")
    assert config.name == "planted-next" and config.phases is not None and config.phases.noise is not None
    points = config.phases.noise.points
    assert len(points) == first.num_settings <= 40
    assert {p["kd_ratio"] for p in points} == {0, 0.25, 0.5, 0.75, 1}
    assert all(p["alpha"] == 2 * p["rank"] for p in points if p["rank"] != 64), "under the sweep's own alpha rule"
    assert not set(config.phases.noise.seeds) & {0} and config.phases.confirm is not None, "fresh seeds, and the defaults"
    assert not set(config.phases.noise.seeds) & set(config.phases.confirm.seeds) and len(set(config.phases.confirm.seeds)) == 8
    text = markdown(analysis)
    assert f"{first.num_trials} trials" in text and QUESTIONS["full"].text in text.split("What to run next")[1]
    assert sweep_main([str(folder / "next.yaml"), f"storage.path={tmp_path}", "--dry-run"]) == 0
    assert "planted-next" in capsys.readouterr().out


def test_what_has_no_room_in_next_yaml_is_in_another_one_and_goes_with_its_question(tmp_path: Path) -> None:
    folder = study(tmp_path, planted(grid(), truth, noise=0.01))
    (folder / "next-9.yaml").write_text("# mine\n", encoding="utf-8")
    (folder / "next-8.yaml").write_text("# next-8.yaml:\n# of an analysis before\n", encoding="utf-8")
    analysis = analyse(folder)
    written = {path.name for path in write(analysis, folder)}
    names = [each.file for each in analysis.upcoming]
    assert len(names) > 1 and names == ["next.yaml", *(f"next-{i + 1}.yaml" for i in range(1, len(names)))]
    assert set(names) <= written and {p.name for p in folder.glob("next*.yaml")} == {*names, "next-9.yaml"}
    configs = [load(folder / name) for name in names]
    assert len({config.name for config in configs}) == len(names)
    assert {p["method"] for c in configs for p in c.phases.noise.points if "method" in p} == {"neo", "lora", "kd", "sft"}  # type: ignore[union-attr]
    for each in analysis.upcoming:
        assert each.num_settings <= 40 and all(f"# {question}\n" in (folder / each.file).read_text() for question in each.asked)


def told_apart(tmp_path: Path, device: str) -> tuple[list[Guideline], dict[str, str]]:
    """The undecided guidelines of a study, and of each that next.yaml leaves out the reason."""
    records = [r.model_copy(update={"details": {**r.details, "device": device}}) for r in planted(grid(), truth, noise=0.01)]
    analysis = analyse(study(tmp_path, records))
    asked = {question for each in analysis.upcoming for question in each.asked}
    left = dict(text.removesuffix(")").rsplit(" (", 1) for each in analysis.upcoming for text in each.left)
    undecided = [g for g in analysis.guidelines if g.verdict == "undecided"]
    for guideline in undecided:
        assert (guideline.hypothesis in asked) != (guideline.hypothesis in left), guideline.hypothesis
    return undecided, left


def test_every_undecided_guideline_is_asked_or_named_with_the_reason_why_not(tmp_path: Path) -> None:
    undecided, left = told_apart(tmp_path, "NVIDIA H200")
    assert "learning_rate × kd_ratio" in {g.axis for g in undecided}, "an interaction is among them"
    assert not [g.axis for g in undecided if g.hypothesis in left]


def test_no_cpu_is_asked_for_the_memory_of_methods(tmp_path: Path) -> None:
    _, left = told_apart(tmp_path, "CPU Xeon")
    assert left == {QUESTIONS["memory"].text: "trials on a GPU would decide it"}
    assert f"in no file: {QUESTIONS['memory'].text} (trials on a GPU would decide it)" in markdown(analyse(tmp_path / "results"))


def test_an_axis_of_names_asks_for_each_of_them_and_what_has_no_setting_is_named() -> None:
    records = planted([{"divergence": d, "learning_rate": r} for d in ("forward_kl", "reverse_kl") for r in RATES], lambda p: 4.6)
    config = sweep(
        search={"divergence": {"choice": ["forward_kl", "reverse_kl"]}, "learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    )
    found = gather(records, config)
    guidelines = [g for g in derive(records, config) if g.axis in ("divergence", "training") and not g.place]
    assert {g.verdict for g in guidelines if g.axis == "divergence"} == {"undecided"}
    strange = replace(guidelines[0], axis="wheels", hypothesis="select_ce depends on wheels", verdict="undecided")
    (only,) = upcoming(found, [*guidelines, strange], fitted(found))
    assert "select_ce depends on divergence" in only.asked and only.left == (
        "select_ce depends on wheels (no setting is known that would decide it)",
    )
    noise = only.config.phases.noise  # type: ignore[union-attr]
    assert {p["divergence"] for p in noise.points} == {"forward_kl", "reverse_kl"}  # type: ignore[union-attr]


def test_a_method_of_all_parameters_is_asked_at_rates_of_its_own_whichever_is_the_best() -> None:
    config = sweep(search={"method": {"choice": ["neo", "kd"]}, "learning_rate": {"log_uniform": [1e-5, 1e-2]}})
    records = [
        r.model_copy(update={"config": {**r.config, "method": r.params["method"]}})
        for r in planted(
            [{"method": m, "learning_rate": 1e-4} for m in ("kd", "neo")], lambda p: 4.5 + 0.1 * (p["method"] == "neo")
        )
    ]
    found = gather(records, config)
    kd = [g for g in derive(records, config) if g.hypothesis.startswith("neo beats kd")]
    (only,) = upcoming(found, kd, fitted(found))
    rates = {p["method"]: [] for p in only.config.phases.noise.points}  # type: ignore[union-attr]
    for point in only.config.phases.noise.points:  # type: ignore[union-attr]
        rates[point["method"]].append(point["learning_rate"])
    assert rates == {"neo": [3.33e-4, 1e-3, 3e-3], "kd": [3.33e-5, 1e-4, 3e-4]}


def test_what_is_decided_is_not_asked_again(tmp_path: Path) -> None:
    records = planted(grid(), truth, noise=0.01)
    found = gather(records, sweep())
    guidelines = [g for g in derive(records, sweep()) if g.verdict != "undecided" and "extend" not in g.claim]
    assert guidelines and upcoming(found, guidelines, fitted(found)) == ()
    assert upcoming(gather(records, None), derive(records, None), fitted(found)) == (), "there is no sweep file to go on from"
