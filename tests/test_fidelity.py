"""Is the page about stored targets what its records say? And would the table show a store that teaches something else?"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from fidelity import FILES, FOLDER, SEEDS, differences, means, page, rendered, root_mean_square, scores, seeds_of, swapped

from neo_ray.loading import load
from neo_ray.space import build_space
from neo_ray.trials import grid_settings


def test_the_page_is_what_the_records_say() -> None:
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == page(FOLDER)


def test_every_arm_has_the_settings_of_the_sweep_file() -> None:
    config = load(FOLDER / "sweep.yaml")
    settings = {(params["rank"], params["learning_rate"]) for params, _ in grid_settings(config, build_space(config))}
    assert len(settings) == 8 and all(set(values) == settings for values in scores(FOLDER).values())


def test_a_stored_teacher_is_no_farther_from_a_living_one_than_another_seed_and_keeps_the_order() -> None:
    found = scores(FOLDER)
    between = differences(found)
    assert {name: len(values) for name, values in between.items()} == {SEEDS: 24, "projection": 24, "hidden": 8}
    for arm in ("projection", "hidden"):
        assert np.median(np.abs(between[arm])) <= np.median(np.abs(between[SEEDS]))
        assert root_mean_square(between[arm]) <= root_mean_square(between[SEEDS])
        assert abs(np.mean(between[arm])) <= 2 * np.std(between[arm], ddof=1) / len(between[arm]) ** 0.5
        seeds = seeds_of(found, arm)
        assert not swapped(means(found, "live", seeds), means(found, arm, seeds))
    assert not swapped(means(found, "live", [0]), means(found, "live", [1, 2]))
    assert found["hidden", 0] == found["live", 0], "as the page says: to the last bit"


def test_another_score_is_seen(tmp_path: Path) -> None:
    for name in (name for names in FILES.values() for name in names):
        shutil.copyfile(FOLDER / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    text = (tmp_path / "hidden.jsonl").read_text()
    (tmp_path / "hidden.jsonl").write_text(text.replace('"select_ce":4.7', '"select_ce":6.7'))
    assert rendered(tmp_path) != rendered(FOLDER)
