"""Do the committed figures of a CPU keep what is promised? Reference: the bars below, each over medians of one run."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from neo_ray import bench, bench_summary, environment

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
NO_DEARER_THAN_SFT = 1.05
LIVE_IS_DEARER, REFERENCE_IS_DEARER = 1.3, 1.5
LESS_MEMORY_THAN_DENSE = 8
DELIVERED = 10
"""Times what a step consumes, with a first pass's checksums too."""


def cases(benchmark: str, **setting: int) -> list[dict[str, Any]]:
    """Of every CPU that was measured; each has a case of this setting."""
    files = sorted(RESULTS.glob(f"{benchmark}-cpu-*.json"))
    assert files, f"no figures of `bench {benchmark}`"
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    found = [[case for case in result["cases"] if setting.items() <= case["setting"].items()] for result in results]
    assert all(len(of_file) == 1 for of_file in found), f"`bench {benchmark}` has no figures at {setting}"
    return [case for of_file in found for case in of_file]


def times(case: dict[str, Any]) -> dict[str, float]:
    return {name: arm["time_ratio"]["value"] for name, arm in case["arms"].items()}


def test_a_step_with_stored_projections_costs_that_of_sft_and_less_than_a_live_teacher_s_and_the_reference_s() -> None:
    for case in cases("step", batch_size=4, length_tokens=256):
        assert case["setting"]["teacher"] == "quickstart:smollm2-135m-instruct"
        time = times(case)
        assert time["neo_projection"] / time["lora"] <= NO_DEARER_THAN_SFT
        assert time["neo"] / time["neo_projection"] >= LIVE_IS_DEARER
        assert time["reference"] / time["neo_projection"] >= REFERENCE_IS_DEARER


def test_the_ceiling_from_the_parameters_stands_beside_what_was_measured() -> None:
    for case in cases("step", batch_size=4, length_tokens=256):
        ceiling = case["arms"]["neo"]["counted_ratio"]
        assert ceiling == pytest.approx(1.65, abs=0.05), "of the quickstart's pair"
        line = f"costs {ceiling:.2f} × that without a teacher (for 8B → 1B 4.00 ×): the most that a store can spare"
        assert line in bench.rendered(RESULTS)
        assert f"| live teacher (counted {ceiling:.2f}; for 8B → 1B 4.00) |" in bench_summary.summary(RESULTS)


@pytest.mark.parametrize("arm", ["neo_projected", "neo_chunked", "neo_topk"])
def test_a_loss_in_chunks_takes_an_eighth_of_the_dense_one_s_memory_and_no_more_time(arm: str) -> None:
    for case in cases("loss", tokens=2048, vocabulary=49_152):
        mine, dense = case["arms"][arm], case["arms"]["neo"]
        assert mine["median_extra_bytes"] * LESS_MEMORY_THAN_DENSE <= dense["median_extra_bytes"]
        assert times(case)[arm] <= times(case)["neo"]


def test_a_loss_of_stored_projections_costs_that_of_cross_entropy_in_the_same_chunks() -> None:
    """At every size that was measured."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("loss-cpu-*.json"))]
    both = [times(case) for result in results for case in result["cases"] if "lora_chunked" in case["arms"]]
    assert both
    for time in both:
        assert time["neo_projected"] / time["lora_chunked"] <= NO_DEARER_THAN_SFT


def test_a_store_spares_a_sweep_time() -> None:
    assert all(times(case)["stored"] < times(case)["live"] for case in cases("sweep", trials=8))


def test_a_store_delivers_many_times_what_a_step_consumes() -> None:
    for case in cases("reader", batch_size=4, length_tokens=256):
        assert case["setting"]["teacher"] == "quickstart:smollm2-135m-instruct"
        time = times(case)
        assert time["step"] / time["reader"] >= DELIVERED and time["step"] / time["first_pass"] >= DELIVERED


def test_figures_are_those_of_a_commit_and_made_by_make_bench() -> None:
    """Nobody can make again what a changed tree gave, or a command that is written nowhere."""
    makefile = (RESULTS.parent.parent / "Makefile").read_text(encoding="utf-8")
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-cpu-*.json"))]
    assert {result["benchmark"] for result in files} == {"step", "loss", "sweep", "reader"}
    for result in files:
        assert re.fullmatch("[0-9a-f]{40}", result["environment"]["git_revision"]), result["benchmark"]
        assert f"\t{result['command'].replace('python', '$(PY)', 1)}\n" in makefile


def test_figures_that_are_written_leave_a_revision_as_it_is_and_all_else_changes_it(tmp_path: Path) -> None:
    """So that one benchmark's figures do not make the next one's those of a changed tree."""
    for name in ("docs/benchmarks/step.json", "docs/page.md", "neo_ray/bench.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    here = tmp_path / "neo_ray"
    clean = environment._revision(here)
    assert clean is not None and len(clean) == 40
    (tmp_path / "docs/benchmarks/step.json").write_text("new")
    assert environment._revision(here) == clean
    for name in ("docs/page.md", "neo_ray/bench.py"):
        (tmp_path / name).write_text("new")
        assert environment._revision(here) == f"{clean}-changed"
        (tmp_path / name).write_text("old")
