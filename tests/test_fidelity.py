"""Is the page about stored targets what its records say? And would the table show a store that teaches something else?"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from fidelity import AGAIN, FOLDER, LIVE, page, rendered, root_mean_square, scores, swapped

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

    def distances(arm: str) -> list[float]:
        return [abs(value - found[LIVE][setting]) for setting, value in found[arm].items()]

    for arm in ("projection", "hidden"):
        assert np.median(distances(arm)) <= np.median(distances(AGAIN))
        assert root_mean_square(distances(arm)) <= root_mean_square(distances(AGAIN))
        assert not swapped(found[LIVE], found[arm])


def test_another_score_is_seen(tmp_path: Path) -> None:
    for name in ("live", "projection", "hidden"):
        shutil.copyfile(FOLDER / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    text = (tmp_path / "hidden.jsonl").read_text()
    (tmp_path / "hidden.jsonl").write_text(text.replace('"select_ce":4.7', '"select_ce":6.7'))
    assert rendered(tmp_path) != rendered(FOLDER)
