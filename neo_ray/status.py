"""How far is a sweep? `python -m neo_ray.status results/<name> [--json] [--watch SECONDS]`: from its files alone, at any time.

The results may be a URL (`s3://bucket/results/<name>`).

Exit codes: 0 running or done, 1 trials are left and nobody drives the sweep, 2 no sweep there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from neo_ray import door, uploads
from neo_ray.budget import exhausted, hours_of
from neo_ray.config import SweepConfig
from neo_ray.lease import holder
from neo_ray.loading import load
from neo_ray.phases import Phase, phases_of, planned_trials, trials_left
from neo_ray.records import Journal, TrialRecord, fold
from neo_ray.scores import objective_called
from neo_ray.settings import ConfigError
from neo_ray.storage import Folder, at
from neo_ray.trials import setting_text

NOBODY = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print where a sweep stands; the exit code says whether somebody has to do something."""
    parser = argparse.ArgumentParser(prog="python -m neo_ray.status", description="How far a running or finished sweep is.")
    parser.add_argument("path", help="a results folder (results/<name>), or its URL")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="again and again, while it is driven")
    asked = parser.parse_args(argv)
    with door.end() as end, contextlib.suppress(KeyboardInterrupt):
        while True:
            found = status(at(asked.path))
            print(json.dumps(found) if asked.json else "\n".join(lines(found)), flush=True)
            if asked.watch is None or not found["driver"]:
                end.code = NOBODY if found["unfinished"] and not found["driver"] else 0
                break
            time.sleep(asked.watch)
    return end.code


def status(folder: Folder) -> dict[str, Any]:
    """Where a sweep stands, as JSON types. Tokens are training tokens without padding; what is not known is null.

    Raises:
        ConfigError: no sweep is there.
    """
    try:
        here = uploads.bring(folder)
        config = load(here / "sweep.yaml")
    except ConfigError as error:
        raise ConfigError(f"{folder}: holds no sweep ({error})") from None
    events = list(Journal(folder).events())
    records = fold(events)
    phases, driver = phases_of(config), holder(folder)
    objective = {"metric": config.objective.metric, "label": objective_called(config, records, here)}
    files = ("journal.jsonl" if isinstance(folder, Path) else "journal", "logs", "report.md", "report.html")
    left = trials_left(phases, records, lambda tag: hours_of(events, tag))
    planned = planned_trials(phases, records)
    running = [r for r in records if not r.finished]
    failed = [r for r in records if r.state == "FAILED"]
    causes = sorted({r.cause or "unknown" for r in failed})
    seconds = sum(r.seconds for r in records)
    spent = exhausted(config.budget, records, hours_of(events), resuming=bool(running))
    return {
        "sweep": config.name,
        "driver": driver,
        "planned": planned,
        "phase": next(iter(left), None) if phases[0].name else None,
        "phases": {tag: _counts(phase, records, left) for phase in phases if (tag := phase.name)},
        "unfinished": 0 if spent else sum(left.values()),
        "budget_spent": spent,
        "states": dict(Counter(r.state for r in records)),
        "running": [{**_running(record, config), **objective} for record in running],
        "best": {**best, **objective} if (best := _best(records, config)) else None,
        "failures": {cause: [r.id for r in failed if (r.cause or "unknown") == cause] for cause in causes},
        "tokens": sum(r.tokens for r in records),
        "tokens_per_worker_second": sum(r.tokens for r in records) / seconds if seconds else None,
        "seconds_left": _seconds_left(records, planned, config) if driver else None,
        "paths": {name: str(folder / name) for name in files} | {"study.db": str(config.folder / "study.db")},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a person."""
    driver = found["driver"]
    who = "nobody drives it"
    if driver:
        since = (
            datetime.fromtimestamp(driver["since"], UTC).strftime("%Y-%m-%d %H:%M UTC") if driver["since"] else "an unknown time"
        )
        who = (
            f"driven by process {driver['pid']} on {driver['host']} since {since}, heard of {driver['silent_seconds']:.0f} s ago"
        )
    done = sum(count for state, count in found["states"].items() if state != "RUNNING")
    states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(found["states"].items()))
    text = [f"{found['sweep']}: {who}", f"trials: {done}/{found['planned']}{f' ({states})' if states else ''}"]
    for name, (finished, of) in found["phases"].items():
        text.append(f"  {name}: {finished}/{of}{' (now)' if name == found['phase'] else ''}")
    for trial in found["running"]:
        value = f", {trial['label']} {trial['value']:.4f}" if trial["value"] is not None else ""
        text.append(f"  {trial['id']} {trial['share']:.0%} ({trial['tokens']:,} tokens{trial['of']}){value}")
    if found["best"]:
        best = found["best"]
        text.append(f"best: {best['label']} {best['value']:.4f} in trial {best['id']} ({setting_text(best['params'])})")
    text += [f"failed: {cause}: {', '.join(ids)}" for cause, ids in sorted(found["failures"].items())]
    if found["tokens_per_worker_second"]:
        text.append(f"tokens: {found['tokens']:,}, {found['tokens_per_worker_second']:,.0f} a second of a trial")
    if found["seconds_left"] is not None:
        text.append(f"left: about {found['seconds_left'] / 60:.0f} min, by the trials so far")
    if found["budget_spent"]:
        text.append(f"the budget is spent ({found['budget_spent']})")
    if found["unfinished"] and not driver:
        text.append(f"{found['unfinished']} trials are left: the sweep's own command goes on")
    return [*text, *(f"{name}: {path}" for name, path in found["paths"].items())]


def _counts(phase: Phase, records: list[TrialRecord], left: dict[str, int]) -> tuple[int, int]:
    """Trials of a phase that have ended, of so many, or of at most so many."""
    finished = sum(r.finished for r in phase.own(records))
    return finished, finished + left.get(phase.tag, 0)


def _running(record: TrialRecord, config: SweepConfig) -> dict[str, Any]:
    """Its share by evaluations; by tokens or steps where the trial's length is stated in them."""
    training = record.config.get("training") or {}
    wanted, steps = training.get("tokens"), training.get("steps")
    share = record.tokens / wanted if wanted else record.steps / steps if steps else len(record.curve) / config.evaluation.points
    return {
        "id": record.id,
        "share": min(1.0, share),
        "tokens": record.tokens,
        "of": f" of {wanted:,}" if wanted else "",
        "value": record.metrics.get(config.objective.metric),
        "attempts": record.attempts,
    }


def _best(records: list[TrialRecord], config: SweepConfig) -> dict[str, Any] | None:
    from neo_ray.report import ranked

    metric = config.objective.metric
    complete = [r for r in records if r.state == "COMPLETE" and r.metrics.get(metric) is not None]
    if not complete:
        return None
    best = ranked(complete, metric, config.objective.mode)[0]
    return {"id": best.id, "value": best.metrics[metric], "params": best.params}


def _seconds_left(records: list[TrialRecord], planned: int, config: SweepConfig) -> float | None:
    """From the mean time of the trials that have run, with as many at a time as run now."""
    finished = [r.seconds for r in records if r.finished and r.seconds]
    running = [_running(r, config)["share"] for r in records if not r.finished]
    if not finished:
        return None
    left = planned - sum(r.finished for r in records) - sum(running)
    return max(0.0, left) * sum(finished) / len(finished) / max(1, len(running))


if __name__ == "__main__":
    sys.exit(main())
