"""Can a notebook ask the fits? Reference: statsmodels on the same design, and a committed study's own guidelines.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from planted import planted
from statsmodels.regression.linear_model import OLS
from test_analyze import folder_with
from test_laws import GAMMA, grid, truth

import neo_ray

STUDY = Path(__file__).parent.parent / "docs" / "studies" / "quickstart"


def test_the_surface_tells_the_metric_of_settings_with_its_interval(tmp_path: Path) -> None:
    found = neo_ray.load(folder_with(tmp_path, planted(grid(), truth, noise=0.01)))
    surface = found.surface
    assert surface is not None and surface.trusted
    settings = found.frame[[c.column for c in surface.coordinates.values()]].iloc[::4]
    told = surface.expected(settings)
    fitted = OLS(surface.gains, surface.design).fit(cov_type="HC3", use_t=True)
    ends = fitted.get_prediction(surface.rows(settings)).conf_int(alpha=0.05)
    assert np.allclose(told["mean"], -fitted.predict(surface.rows(settings))) and list(told.index) == list(settings.index)
    assert np.allclose(told[["low", "high"]], -ends[:, ::-1]), "a loss is not a gain: the ends change places"
    true = [truth(found.records[int(at)].params) for at in settings.index]
    assert np.abs(told["mean"] - true).max() < 0.03
    with pytest.raises(KeyError, match="rank"):
        surface.expected(settings.drop(columns="rank"))


def test_the_law_is_the_one_that_the_guidelines_tell(tmp_path: Path) -> None:
    law = neo_ray.load(folder_with(tmp_path, planted(grid(), truth, noise=0.01))).law
    assert law is not None and law.gamma_interval is not None and law.gamma_interval[0] < GAMMA < law.gamma_interval[1]
    study = neo_ray.load(STUDY)
    said = json.loads((STUDY / "guidelines.json").read_text(encoding="utf-8"))
    assert study.law is not None and study.surface is not None
    assert study.law.gamma == pytest.approx(said["law"]["gamma"]) and study.surface.r2 == pytest.approx(said["surface"]["r2"])
    assert study.law.gamma_interval == pytest.approx(said["law"]["gamma_interval"])
