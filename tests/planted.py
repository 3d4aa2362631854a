"""What would a sweep's records look like if we knew the truth? Synthetic trials from a planted surface plus noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from neo_ray.config import SweepConfig
from neo_ray.loading import plain, validate
from neo_ray.records import TrialRecord
from neo_ray.settings import TrialConfig

UNTRAINED = {"select_ce": 5.18, "select_kl": 1.26}
Params = dict[str, Any]
Surface = Callable[[Params], float]


def flat(params: Params) -> float:
    return 4.6


def valley(params: Params) -> float:
    """Best at learning rate 1e-3; each doubling of the rank gains 0.03; alpha and kd_ratio do nothing."""
    return 4.6 + 0.15 * (math.log10(params["learning_rate"]) + 3) ** 2 - 0.03 * math.log2(params["rank"] / 16)


def draw(num_trials: int, seed: int) -> list[Params]:
    """Random settings of four axes."""
    rng = np.random.default_rng(seed)
    return [
        {
            "rank": int(rng.choice([4, 8, 16, 32, 64])),
            "alpha": float(rng.choice([8, 16, 32, 64])),
            "learning_rate": float(10 ** rng.uniform(-4, -2)),
            "kd_ratio": float(rng.choice([0.0, 0.25, 0.5, 0.75])),
        }
        for _ in range(num_trials)
    ]


def trial(id: str, params: Params, ce: float | None, **fields: Any) -> TrialRecord:
    """One COMPLETE trial, unless `fields` says otherwise."""
    config = plain(TrialConfig())
    for section, names in {"lora": ("rank", "alpha"), "distill": ("kd_ratio",), "training": ("learning_rate",)}.items():
        config[section] |= {name: params[name] for name in names if name in params}
    kl = None if ce is None else ce - 3.9
    metrics = {"select_ce": ce, "select_bits_per_byte": None if ce is None else ce / 3.1, "select_kl": kl}
    fields = {"state": "COMPLETE", "metrics": metrics, "details": {"baseline": dict(UNTRAINED)}, **fields}
    config["seed"] = fields.get("seed", 0)
    curve = [{"rung": 1, "tokens": 1000, "step": 5, "select_ce": None if ce is None else ce + 0.2}]
    scaling = params["alpha"] / params["rank"] if {"alpha", "rank"} <= set(params) else None
    given = {"curve": curve, "scaling": scaling, "tokens": 4000, "seconds": 12.0, "peak_memory_bytes": 2_100_000_000}
    return TrialRecord(id=id, params=params, config=config, **{**given, **fields})


def planted(
    settings: Iterable[Params], surface: Surface, seed: int = 0, noise: float = 0.02, seeds: Iterable[int] = (0,)
) -> list[TrialRecord]:
    """A COMPLETE trial for each setting and seed."""
    rng = np.random.default_rng(1000 + seed)
    pairs = [(params, s) for params in settings for s in seeds]
    return [trial(f"t{i:03d}", p, surface(p) + noise * rng.standard_normal(), seed=s) for i, (p, s) in enumerate(pairs)]


def sweep(**changes: Any) -> SweepConfig:
    """A sweep file for the settings of `draw`."""
    raw = {
        "name": "planted",
        "teacher": {"model": "some/teacher"},
        "student": {"model": "some/student"},
        "data": {"source": "text.jsonl"},
        "search": {
            "rank": {"choice": [4, 8, 16, 32, 64]},
            "alpha": {"choice": [8, 16, 32, 64]},
            "learning_rate": {"log_uniform": [1e-4, 1e-2]},
            "kd_ratio": {"choice": [0, 0.25, 0.5, 0.75]},
        },
        "sampler": {"name": "random", "num_trials": 24},
    }
    return validate({**raw, **changes})


def everything() -> list[TrialRecord]:
    """A sweep that has something for every figure: a grid of rank × learning rate × kd_ratio on two slots, three seeds at
    each of kd_ratio 0.5, four evaluations, costs that grow with rank, trials pruned at the smallest learning rate, diverged and
    out of memory at the largest."""
    rng = np.random.default_rng(7)
    settings = [
        ({"rank": rank, "learning_rate": rate, "kd_ratio": ratio}, seed)
        for ratio, seeds in ((0.5, (0, 1, 2)), (0.0, (0,)))
        for rank in (4, 8, 16, 32, 64)
        for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
        for seed in seeds
    ]
    records = []
    for i, (params, seed) in enumerate(settings):
        end = valley(params) - 0.05 * params["kd_ratio"] + 0.01 * rng.standard_normal()
        curve = [
            {"rung": k, "tokens": 1000 * k, "step": 5 * k, "select_ce": end + 0.5 * 0.5**k - 0.03, "seconds": 3.0 * k}
            for k in (1, 2, 3, 4)
        ]
        begun, seconds = 1_700_000_000.0 + 30 * (i // 2), 24 + params["rank"] / 16 + rng.uniform(0, 2)
        costs: dict[str, Any] = {
            "seconds": seconds,
            "accelerator_seconds": seconds,
            "peak_memory_bytes": int(2e9 + 1e7 * params["rank"]),
            "started": begun,
            "ended": begun + seconds,
            "details": {"baseline": dict(UNTRAINED), "slot": i % 2},
        }
        change: dict[str, Any] = {"curve": curve}
        if params["learning_rate"] == 1e-4 and seed == 0:
            change = {"state": "PRUNED", "curve": curve[:2]}
        elif params["learning_rate"] == 1e-2 and params["rank"] == 64:
            change = {"state": "FAILED", "cause": "out_of_memory", "error": "OutOfMemoryError: 2 GiB", "metrics": {}, "curve": []}
        elif params["learning_rate"] == 1e-2 and params["rank"] == 4 and seed == 0:
            change = {"state": "FAILED", "cause": "diverged", "error": "loss is NaN at step 3", "metrics": {}, "curve": curve[:1]}
        records.append(trial(f"{i:04d}", params, end, seed=seed, **{**costs, **change}))
    return records
