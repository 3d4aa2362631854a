"""What does the report of very many trials cost? `PYTHONPATH=.:tests python tests/scale_report.py [--trials 10000] [--out FILE]`.

The command runs as it stands, in a process of its own, on a journal of made-up trials: four axes, five evaluations each, a fifth
stopped early, one in twenty diverged. Seconds, CPU seconds and the peak of memory are what the system counted for it, imports
included.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from planted import UNTRAINED, draw, sweep, valley

from neo_ray.devices import describe
from neo_ray.loading import dump

RUNGS = 5


def events(num_trials: int) -> Iterator[dict[str, Any]]:
    """A journal: start, reports, end of each trial."""
    rng = np.random.default_rng(0)
    for i, params in enumerate(draw(num_trials, 0)):
        trial, begun = f"{i:05d}", 1_700_000_000.0 + 30 * i
        stopped, diverged = i % 5 == 4, i % 20 == 7
        config = {"lora": {"rank": params["rank"], "alpha": params["alpha"]}, "seed": i % 3}
        given = {"params": params, "config": config, "phase": "map", "seed": i % 3, "scaling": params["alpha"] / params["rank"]}
        yield {"event": "start", "trial": trial, "time": begun, **given}
        end = valley(params) + 0.02 * rng.standard_normal()
        for rung in range(1, (2 if stopped or diverged else RUNGS) + 1):
            ce = end + 0.5 * 0.5**rung
            row = {"rung": rung, "tokens": 1000 * rung, "step": 5 * rung, "seconds": 3.0 * rung, "learning_rate": 1e-3}
            row |= {name: ce for name in ("train_loss", "train_ce", "select_ce", "select_bits_per_byte", "select_kl")}
            yield {"event": "report", "trial": trial, "time": begun + 3 * rung, "row": row}
        state = "PRUNED" if stopped else "FAILED" if diverged else "COMPLETE"
        costs = {"seconds": 15.0, "accelerator_seconds": 15.0, "tokens": 5000, "steps": 25}
        costs["peak_memory_bytes"] = int(2e9 + 1e7 * params["rank"])
        more = {"cause": "diverged", "error": "loss is NaN at step 12"} if diverged else {"metrics": {"report_ce": end + 0.5**6}}
        details = {"baseline": dict(UNTRAINED), "slot": i % 8}
        yield {"event": "end", "trial": trial, "time": begun + 15, "state": state, "details": details, **costs, **more}


def measured(num_trials: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    try:
        with (folder / "journal.jsonl").open("w") as file:
            file.writelines(json.dumps(event) + "\n" for event in events(num_trials))
        (folder / "sweep.yaml").write_text(dump(sweep()), encoding="utf-8")
        begun = time.time()
        code = subprocess.run([sys.executable, "-m", "neo_ray.analyze", str(folder)], stdout=subprocess.DEVNULL).returncode
        seconds, used = time.time() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        told = json.loads((folder / "guidelines.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "trials": num_trials,
        "states": told["generated_from"]["trials"],
        "cross_check_settings": told["cross_check"]["num_settings"],
        "code": code,
        "device": describe(torch.device("cpu")),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(seconds, 1),
        "peak_bytes": used.ru_maxrss * 1024,
        "file_bytes": files,
    }


def sentence(found: dict[str, Any]) -> str:
    """What the page says of it."""
    counts = ", ".join(f"{count:,} {state}" for state, count in found["states"].items())
    return (
        f"{found['trials']:,} trials ({counts}) took {math.ceil(found['cpu_seconds'])} CPU seconds ({found['device']}) and "
        f"{found['peak_bytes'] / 1e6:,.0f} MB at the peak, from the journal to every file; `report.html` has "
        f"{found['file_bytes']['report.html'] / 1e6:.0f} MB. The Gaussian process saw {found['cross_check_settings']} settings."
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = measured(asked.trials)
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return int(found["code"])


if __name__ == "__main__":
    sys.exit(main())
