"""How many trials run at a time on one machine, each in workers of its own, until its memory ends? And what do they take?

`PYTHONPATH=.:tests python tests/worker_groups.py [--slots 2 4 8] [--out docs/worker_groups.json]`: for each a sweep of the tests'
tiny pair, of as many trials, whose steps are held until all of them train. Models are tiny: what remains is what a worker group
costs whatever it trains. docs/scale.md has the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from doors import kill, start, sweep_file
from intact import begun, watched_steps
from test_faults import FAULT
from tiny import World, make_world

from neo_ray.records import load_records

KINDS = {
    "ray::RayTrainWorker": "worker",
    "ray::TrainController": "controller",
    "ray::ResourceTrainable": "relay",
    "ray::Relay": "relay",
    "PlacementGroupCleaner": "clean-up of placement groups",
    "DatasetManager": "dataset manager",
    "SynchronizationActor": "synchronization",
    "PreemptionWatcher": "watcher for preemptions",
    "ray::Board": "board",
    "ray::IDLE": "idle",
}
"""Words of a process's command line → what it is; the others are Ray's own, once a machine."""
SECONDS_TO_BEGIN = 900.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 4, 8, 12])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="groups-"))
    memory = psutil.virtual_memory().total
    found: dict[str, Any] = {"cpus": psutil.cpu_count(), "memory_bytes": memory, "rows": []}
    try:
        world = make_world(folder / "world")
        for count in asked.slots:
            found["rows"].append(measured(folder / str(count), world, count))
            print(json.dumps(found["rows"][-1]), flush=True)
            if asked.out is not None:
                asked.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(row["complete"] == row["slots"] for row in found["rows"]) else 1


def measured(folder: Path, world: World, count: int) -> dict[str, Any]:
    """One sweep of so many trials at a time: what its processes hold while all of them train, and how they ended."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULT + watched_steps())
    (folder / "hold").touch()
    path = sweep_file(
        world,
        folder,
        method="lora",
        search={"learning_rate": {"log_uniform": [1e-3, 1e-2]}},
        sampler={"name": "random", "num_trials": count},
        scheduler={"name": "none"},
        resources={"concurrency": count, "cpus_per_worker": 0.01, "memory_check": False},
    )
    before, asked = psutil.virtual_memory().available, time.monotonic()
    process = start(path, also_import=folder)
    training: set[int] = set()
    lowest = before
    while len(training) < count and process.poll() is None and time.monotonic() - asked < SECONDS_TO_BEGIN:
        time.sleep(1)
        lowest = min(lowest, psutil.virtual_memory().available)
        training = {step.pid for step in begun(folder) if psutil.pid_exists(step.pid)}
    row: dict[str, Any] = {"slots": count, "began": len(training), "seconds_to_begin": time.monotonic() - asked}
    time.sleep(5)
    row |= {"available_bytes": psutil.virtual_memory().available, "lowest_available_bytes": lowest, "before_bytes": before}
    row["bytes"] = held_by(psutil.Process(process.pid).children(recursive=True))
    row["driver_bytes"] = psutil.Process(process.pid).memory_full_info().pss
    if len(training) < count:
        kill(process)
        return {**row, "complete": 0}
    (folder / "hold").unlink()
    text, _ = process.communicate(timeout=900)
    row["complete"] = sum(record.state == "COMPLETE" for record in load_records(folder / "results" / "tiny"))
    row["lost"] = text.count("lost its workers")
    return row


def table(found: dict[str, Any]) -> str:
    """Rows of a page: what each number of trials at a time took, and what one more did."""
    rows, lines = (
        found["rows"],
        ["| trials at a time | until all train | the processes of all | of which the workers | COMPLETE |"],
    )
    lines.append("| --- " * 5 + "|")
    for row in rows:
        whole = row["driver_bytes"] + sum(kind["bytes"] for kind in row["bytes"].values())
        workers = row["bytes"]["worker"]["bytes"]
        cells = [f"{row['seconds_to_begin']:.0f} s", f"{whole / 1e9:.1f} GB", f"{workers / 1e9:.1f} GB"]
        lines.append(f"| {row['slots']} | {' | '.join(cells)} | {row['complete']} |")
    return "\n".join(lines)


def per_slot(found: dict[str, Any]) -> tuple[float, float]:
    """Bytes of what stands for one more trial on the head, and of its worker, by the fewest and the most at a time."""
    first, last = found["rows"][0], found["rows"][-1]
    kinds = [kind for kind in last["bytes"] if kind not in ("worker", "once a machine", "idle", "board")]
    held = [sum(row["bytes"].get(kind, {"bytes": 0})["bytes"] for kind in kinds) for row in (first, last)]
    workers = [row["bytes"]["worker"]["bytes"] for row in (first, last)]
    more = last["slots"] - first["slots"]
    return (held[1] - held[0]) / more, (workers[1] - workers[0]) / more


def held_by(processes: list[psutil.Process]) -> dict[str, dict[str, int]]:
    """Kind of process → how many there are, and what they hold: pages that several share are each one's in part (PSS)."""
    found: dict[str, dict[str, int]] = {}
    for process in processes:
        try:
            words, share = " ".join(process.cmdline()), process.memory_full_info().pss
        except psutil.Error:
            continue
        kind = next((kind for mark, kind in KINDS.items() if mark in words), "once a machine")
        known = found.setdefault(kind, {"count": 0, "bytes": 0})
        known["count"] += 1
        known["bytes"] += share
    return found


if __name__ == "__main__":
    sys.exit(main())
