"""How does a winner leave its sweep? `python -m neo_ray.export results/<name>`: its adapter, and the merged model scored again.

Exit codes: 0 written, 1 the merged model does not score as the trial did, 2 a mistake, 130 interrupted. A folder is there only
after 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neo_ray import door, loading, uploads
from neo_ray.config import SweepConfig
from neo_ray.records import TrialRecord
from neo_ray.settings import ConfigError
from neo_ray.storage import Folder, at, bring_folder
from neo_ray.trials import find_trial

SCHEMA_VERSION = 1
TOLERANCES = {"fp32": 1e-3, "bf16": 2e-2}
"""Nats per token by which a held-out CE may differ: trial and written weights in fp32, or either of them in bf16.

Measured on seven bf16 trials of the quickstart, written in fp32 and in bf16: at most 3.6e-3. fp32 throughout: below 1e-5.
"""

QUANTISED_TOLERANCE = 0.5
"""Where the trial's base was quantised and the merged one is not. Assumption, not measured: a wrong merge is further off."""


class OtherScores(Exception):
    """The merged model is not the model that the trial's record speaks of."""


@dataclass(frozen=True)
class Chosen:
    place: Folder
    """The results folder, as it was named."""
    folder: Path
    """The same on this machine."""
    sweep: str
    record: TrialRecord
    alone: SweepConfig
    """The sweep file of this one trial."""

    @property
    def adapter(self) -> Path:
        return self.folder / "trials" / self.record.id / "adapter"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m neo_ray.export", description="Write a trial's adapter and merged model, and score that model again."
    )
    parser.add_argument("path", help="a results folder (results/<name>), or its URL")
    parser.add_argument("--trial", metavar="ID", help="which trial; the best one by default")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a new folder; by default <path>/export/<id>, of a URL export/<id>"
    )
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="fp32", help="of the written weights (fp32)")
    asked = parser.parse_args(argv)
    with door.end(failures=(OtherScores,), interrupted="interrupted; nothing was written") as end:
        place = at(asked.path)
        chosen = choose(place, asked.trial)
        beside = place if isinstance(place, Path) else Path()
        out = asked.out.expanduser() if asked.out else beside / "export" / chosen.record.id
        export(chosen, out, asked.dtype)
        print(out)
    return end.code


def choose(place: Folder, wanted: str | None = None) -> Chosen:
    """The trial of this id, or the best one: that of `best.yaml`. What is needed of it is brought to this machine.

    Raises:
        ConfigError: no records, no such trial, or one that left no adapter.
    """
    from neo_ray.report import best_yaml

    folder, records, sweep = uploads.opened(place)
    record = _best(folder, records, sweep) if wanted is None else find_trial(folder, records, wanted)
    alone = loading.validate(yaml.safe_load(best_yaml(sweep, record)))
    chosen = Chosen(place, folder, sweep.name, record, alone.model_copy(update={"name": f"{sweep.name}-{record.id}"}))
    if not isinstance(place, Path):
        bring_folder(place / "trials" / record.id / "adapter", chosen.adapter)
    _check(chosen, records, place)
    return chosen


def export(chosen: Chosen, out: Path, dtype: str) -> dict[str, Any]:
    """Write the folder, whole or not at all. Returns what `export.json` says.

    Raises:
        ConfigError: the folder exists, or models or data cannot be had, or are other ones than the trial's.
        OtherScores: a held-out CE differs from the trial's by more than the tolerance.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} exists; give another folder, or take that one away")
    from neo_ray import devices, merging
    from neo_ray.card import card, licence_of
    from neo_ray.environment import environment
    from neo_ray.prepare import check_same_sources, for_scoring, identities, make_student, prepare
    from neo_ray.quickstart import made_once
    from neo_ray.records import write_atomically

    record, alone = chosen.record, chosen.alone
    scored = for_scoring(alone)
    prepared = prepare(scored, print)
    check_same_sources(
        chosen.folder, identities(scored, prepared), "an adapter goes with what it was trained on: bring that back"
    )
    sources = make_student(scored, prepared, print)
    licence, licence_files = licence_of(*_origin(alone, sources))
    facts: dict[str, Any] = {}

    def make(part: Path) -> None:
        print(f"trial {record.id} of {chosen.sweep}: merging its adapter into the student, in fp32")
        shutil.copytree(chosen.adapter, part / "adapter")
        merging.merge(sources, chosen.adapter, part / "model", devices.resolve_dtype(dtype, devices.local_device()))
        if alone.student.quantization != "none":
            print(f"the trial's base was in {alone.student.quantization}, the merged model's is plain: scores change by that")
        print("scoring the merged model")
        scores = compare(record.metrics, merging.rescore(part / "model", sources, alone.trial))
        tolerance = tolerance_of(record, dtype, alone.student.quantization)
        print(*score_lines(scores), sep="\n")
        check_scores(record.id, scores, tolerance)
        facts.update(_facts(chosen, sources, scores, tolerance, dtype), license=licence, environment=environment())
        write_atomically(part / "export.json", json.dumps(facts, indent=2, allow_nan=False) + "\n")
        write_atomically(part / "trial.yaml", f"# Trial {record.id} of the sweep {chosen.sweep}\n\n{loading.dump(alone)}")
        for folder in (part, part / "model"):  # either may be what is passed on
            write_atomically(folder / "README.md", card(record, alone, facts))
            for path in licence_files:
                shutil.copyfile(path, folder / path.name)

    made_once(out.absolute(), make)
    return facts


def compare(before: dict[str, float | None], after: dict[str, float]) -> dict[str, dict[str, float]]:
    """Before, after and difference of every score that both have."""
    both = {name: (old, new) for name, new in after.items() if (old := before.get(name)) is not None}
    return {name: {"before": old, "after": new, "difference": new - old} for name, (old, new) in both.items()}


def tolerance_of(record: TrialRecord, dtype: str, quantization: str = "none") -> float:
    """By the less exact of the trial's precision and that of the written weights; wider where the base was quantised."""
    if quantization != "none":
        return QUANTISED_TOLERANCE
    exact = record.details.get("dtype") == "float32" and dtype == "fp32"
    return TOLERANCES["fp32" if exact else "bf16"]


def check_scores(trial: str, scores: dict[str, dict[str, float]], tolerance: float) -> None:
    """Raises OtherScores where a held-out CE differs by more than the tolerance, or is not a number."""
    for name, score in scores.items():
        if name.endswith("_ce") and not abs(score["difference"]) <= tolerance:
            raise OtherScores(
                f"trial {trial}: {name} was {score['before']:.6f} and is {score['after']:.6f} merged; {tolerance:g} apart is "
                "allowed. Nothing was written. Have adapter, base model or data changed since?"
            )


def score_lines(scores: dict[str, dict[str, float]]) -> list[str]:
    return [f"{name}: {s['before']:.6f} before, {s['after']:.6f} after, {s['difference']:+.1e}" for name, s in scores.items()]


def _best(folder: Path, records: list[TrialRecord], sweep: SweepConfig) -> TrialRecord:
    from neo_ray.evidence import gather

    found = gather(records, sweep).best
    if found is None:
        raise ConfigError(f"{folder}: no COMPLETE trial has a value of {sweep.objective.metric}, so there is nothing to export")
    return next(record for record in records if record.id == found.id)


def _check(chosen: Chosen, records: list[TrialRecord], place: Folder) -> None:
    """Raises ConfigError where the trial left no adapter, or nothing to judge it by."""
    record, method = chosen.record, chosen.alone.method
    if record.state != "COMPLETE":
        raise ConfigError(f"--trial: trial {record.id} is {record.state}, and only a COMPLETE trial has an adapter")
    if not chosen.alone.trial.has_adapter:
        others = [r.id for r in records if (place / "trials" / r.id / "adapter").exists()]
        raise ConfigError(
            f"--trial: trial {record.id} trained all parameters ({method}), and such trials keep no weights (best.yaml runs the "
            f"setting again); trials with an adapter: {', '.join(others) or 'none'}"
        )
    if record.metrics.get("select_ce") is None and record.metrics.get("report_ce") is None:
        raise ConfigError(f"--trial: the record of trial {record.id} has no held-out CE to compare the merged model with")
    if not (chosen.adapter / "adapter_config.json").is_file():
        raise ConfigError(f"--trial: trial {record.id} has no adapter any more: there is no folder {chosen.adapter}")


def _origin(alone: SweepConfig, sources: Any) -> tuple[str, str | None]:
    """Path and revision of the model whose licence holds: a pruned student's is its teacher's."""
    source = sources.student if alone.student.prune is None else sources.teacher
    return source.path, source.revision


def _facts(chosen: Chosen, sources: Any, scores: dict[str, Any], tolerance: float, dtype: str) -> dict[str, Any]:
    from neo_ray.pruning import LAYERS_FILE

    alone, record = chosen.alone, chosen.record
    pruned = alone.student.prune is not None
    layers = json.loads((Path(sources.student.path) / LAYERS_FILE).read_text(encoding="utf-8")) if pruned else None
    base = alone.teacher if pruned else alone.student
    assert base is not None
    bits = alone.student.quantization
    trained_as = {"trained_as": bits} if bits != "none" else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "sweep": chosen.sweep,
        "results": str(chosen.place),
        "sweep_sha256": hashlib.sha256((chosen.folder / "sweep.yaml").read_bytes()).hexdigest(),
        "guidelines": _guidelines(chosen.folder),
        "trial": record.id,
        "params": record.params,
        "seed": record.seed,
        "base": {"model": base.model, "revision": base.revision, "layers": layers, **trained_as},
        "scores": scores,
        "tolerance": tolerance,
        "dtype": dtype,
        "trial_dtype": record.details.get("dtype", "an unknown precision"),
    }


def _guidelines(folder: Path) -> list[dict[str, str]]:
    """Claims of the sweep that stand or fall; what is undecided is no help to who takes the model."""
    from neo_ray.analyze import analyse

    return [{"verdict": g.verdict, "claim": g.claim} for g in analyse(folder).guidelines if g.verdict != "undecided"]


if __name__ == "__main__":
    sys.exit(main())
