"""What would a whole study look like where nothing matters? Noise alone, with all that a claim of a direction can come from.

Four methods, a second metric, the best of the map again with fresh seeds, and the reference beside it.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
from planted import sweep, trial

from neo_ray.config import SweepConfig
from neo_ray.records import TrialRecord
from neo_ray.settings import TrialConfig
from neo_ray.trials import setting_key

METHODS, RATES, WARMUPS = ("neo", "lora", "kd", "sft"), (2e-4, 6.3e-4, 2e-3, 6.3e-3, 2e-2), (0.0, 0.05, 0.1)
REFERENCE = {"method": "neo", "learning_rate": 2e-4, "warmup_ratio": 0.05}
REPEATED = (REFERENCE, {**REFERENCE, "method": "kd", "learning_rate": 2e-3}, {**REFERENCE, "learning_rate": 6.3e-3})
SEEDS, FRESH, TOP = (1, 2, 3), (101, 102, 103, 104), 3
BASELINE = {"select_ce": 6.0, "select_kl": 2.0, "report_ce": 6.0}
Params = dict[str, Any]


def noise_study() -> SweepConfig:
    """60 settings once, three of them with three seeds, and the best three and the reference with four fresh ones."""
    return sweep(
        lora={"rank": 64, "alpha": 128},
        search={"method": {"choice": METHODS}, "learning_rate": {"choice": RATES}, "warmup_ratio": {"choice": WARMUPS}},
        sampler={},
        phases={
            "noise": {"points": REPEATED, "seeds": SEEDS},
            "map": {},
            "confirm": {"top": TOP, "seeds": FRESH, "reference": REFERENCE},
        },
    )


def noise_records(noise: float, seed: int) -> list[TrialRecord]:
    """Its trials. Runs of one seed share nothing; the metrics of one run share part of their noise."""
    rng = np.random.default_rng(seed)
    config = {
        **TrialConfig().model_dump(mode="json"),
        "lora": {**TrialConfig().lora.model_dump(mode="json"), "rank": 64, "alpha": 128},
    }
    records: list[TrialRecord] = []

    def run(params: Params, phase: str, run_seed: int) -> None:
        ce, kl, report = (noise * rng.standard_normal() for _ in range(3))
        metrics = {"select_ce": 4.6 + ce, "select_kl": 0.7 + (ce + kl) / 2**0.5, "report_ce": 4.6 + (ce + report) / 2**0.5}
        known: Params = {"phase": phase, "seed": run_seed, "metrics": metrics, "details": {"baseline": BASELINE}}
        record = trial(f"{len(records):04d}", params, metrics["select_ce"], **known, peak_memory_bytes=0)
        training = {**config["training"], "learning_rate": params["learning_rate"], "warmup_ratio": params["warmup_ratio"]}
        own = {**config, "method": params["method"], "training": training, "seed": run_seed}
        records.append(record.model_copy(update={"config": own, "scaling": 2.0}))

    for run_seed in SEEDS:
        for params in REPEATED:
            run(params, "noise", run_seed)
    for method in METHODS:
        for rate in RATES:
            for warmup in WARMUPS:
                run({"method": method, "learning_rate": rate, "warmup_ratio": warmup}, "map", 0)
    settings = {setting_key(r.params): r.params for r in records}
    means = {key: fmean(r.metrics["select_ce"] or 0.0 for r in records if setting_key(r.params) == key) for key in settings}
    best = [settings[key] for key in sorted(means, key=lambda key: means[key]) if settings[key] != REFERENCE][:TOP]
    for run_seed in FRESH:
        for params in (REFERENCE, *best):
            run(params, "confirm", run_seed)
    return records
