"""Run a sweep: `python -m neo_ray.sweep FILE [key=value …] [--address ADDRESS] [--dry-run] [--fresh]`.

Exit codes: 0 done, 1 the sweep could not go on, 2 a mistake in the file or its surroundings (nothing written), 130 interrupted
(Ctrl-C), 143 asked to end (SIGTERM, as the stop of a Ray job sends it); both keep a checkpoint of what runs.
The same command again continues a sweep.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from neo_ray import door, ground, inventory, loading, local, uploads
from neo_ray.config import WHERE_IT_RUNS, SweepConfig
from neo_ray.phases import Phase, at_its_path, check_seeds_are_fresh, orphans, phases_of, planned_trials, trials_left
from neo_ray.plan import make_plan
from neo_ray.plan_text import render
from neo_ray.settings import ConfigError
from neo_ray.supply import Supply
from neo_ray.trials import differences, retried
from neo_ray.warm import Warm, check_same_models, warm_trials


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neo_ray.sweep", description="Run or continue a hyperparameter sweep.")
    parser.add_argument("file", help="sweep file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.learning_rate=1e-4")
    parser.add_argument("--address", help="the Ray cluster to run on, from one of its machines: auto, host:port")
    parser.add_argument("--dry-run", action="store_true", help="print what would happen, and stop")
    parser.add_argument("--fresh", action="store_true", help="put an earlier sweep of this name aside and begin anew")
    parser.add_argument("--retry-failed", action="store_true", help="run trials again that FAILED, unless they diverged")
    asked = parser.parse_args(argv)
    terminated = threading.Event()
    if threading.current_thread() is threading.main_thread():  # a job in the background ignores it, and our own watchdogs use it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _end_on_sigterm(terminated)
    with door.end(out_of_reach=door.FAILED) as end:
        config = _load(asked.file, asked.overrides, asked.address)
        if asked.dry_run:
            _dry_run(config, asked.overrides, asked.fresh)
        else:
            end.code = door.FAILED  # unless it comes to its end
            end.code = run(config, phases_of(config), asked.fresh, asked.retry_failed)
    return 128 + signal.SIGTERM if end.code == door.INTERRUPTED and terminated.is_set() else end.code


def _dry_run(config: SweepConfig, overrides: list[str], fresh: bool) -> None:
    print(render(make_plan(config, overrides=overrides)))
    checks = (ground.check_accelerator, _check_earlier, *local.CHECKS, local.check_room)
    for check in (lambda _: _check_same_sweep(config, fresh), lambda _: _check_seeds(config, fresh), *checks):
        try:
            check(config)
        except ConfigError as error:
            print(f"   would be refused: {error}")


def _end_on_sigterm(terminated: threading.Event) -> None:
    """SIGTERM ends a sweep as Ctrl-C does, and leaves a mark: what Ray makes of the exception on its way keeps none."""

    def interrupt(*_: object) -> None:
        terminated.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _load(file: str, overrides: list[str], address: str | None) -> SweepConfig:
    """The sweep, on the cluster asked for. A file that names none runs on that of the Ray job which this process is."""
    config = loading.load(file, overrides)
    inherited = os.environ.get("RAY_ADDRESS", "")
    if inherited.startswith("ray://") and (address or config.resources.address or "auto") == "auto":  # Ray would follow it
        raise ConfigError(
            f"RAY_ADDRESS: {inherited} is the address of a Ray client's server, and a sweep's driver {WHERE_IT_RUNS}"
        )
    if address is None and config.resources.address is None and inherited and not inherited.startswith("http"):
        address = "auto"  # Ray would connect to it in any case
    return config if address is None else loading.load(file, [*overrides, f"resources.address={json.dumps(address)}"])


def run(config: SweepConfig, phases: tuple[Phase, ...], fresh: bool = False, retry_failed: bool = False) -> int:
    """Run what is left of a sweep and report. Returns the exit code."""
    from neo_ray.budget import exhausted, hours_of
    from neo_ray.lease import refuse_if_held
    from neo_ray.progress import SweepConsole
    from neo_ray.records import Journal, fold

    console = SweepConsole(width=None if sys.stdout.isatty() else 140)

    def announce(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    ground.check_writable(config)
    _check_same_sweep(config, fresh)
    ground.check(config)
    _check_seeds(config, fresh)
    warm = _check_earlier(config)
    refuse_if_held(config.results)
    announce(f"sweep {config.name}: preparing")
    sources, supply = ground.prepared(config, announce)
    from neo_ray.prepare import check_same_sources, identities

    identity = identities(config, sources)
    if not fresh:
        check_same_sources(config.folder, identity, "take another name, or --fresh to put that sweep aside")
    for phase in phases:
        with at_its_path(phase.name):
            check_same_models(phase.config, identity)
    for earlier in warm:
        announce(earlier.text)
    events = [] if fresh else list(Journal(config.results).events())
    records, code = retried(fold(events), retry_failed), 0
    if lone := orphans(phases, records):
        announce(f"interrupted trials of phases that the file has no longer are left as they are: {', '.join(lone)}")
    left = trials_left(phases, records, lambda tag: hours_of(events, tag))
    spent = exhausted(config.budget, records, hours_of(events), resuming=any(not record.finished for record in records))
    if left and spent:
        announce(f"the budget is spent ({spent}); with a larger one the same command goes on")
    elif left:
        code = _run_on_ray(config, phases, sources, supply, identity, fresh, retry_failed, console, announce)
    elif any(phase.spent(records, hours_of(events, phase.tag)) for phase in phases):
        announce("nothing is left to do within the budgets of the phases; with larger ones the same command goes on")
    else:
        more = "sampler.num_trials=…" if phases[0].name is None else "phases.exploit.sampler.num_trials=…, phases.confirm.top=…"
        announce(f"all {planned_trials(phases, records)} trials have run; nothing is left to do (more: {more})")
    _report(config, console)
    return code


def _run_on_ray(
    config: SweepConfig,
    phases: tuple[Phase, ...],
    sources: Any,
    supply: Supply,
    identity: dict[str, str],
    fresh: bool,
    retry_failed: bool,
    console: Any,
    announce: Any,
) -> int:
    """Connect, check what concerns the cluster, and only then take the folder and run. Nothing is written before that."""
    from neo_ray.budget import hours_of
    from neo_ray.crew import TargetsFailed
    from neo_ray.lease import LeaseLost, lease
    from neo_ray.progress import Progress
    from neo_ray.records import Journal, fold, settle, write_records
    from neo_ray.slot import log_to
    from neo_ray.tuner import SweepFailed, run_trials

    try:
        with ground.connected(config, sources, supply, announce) as room, lease(config.results) as lost:
            announce(f"{room.capacity}: {room.slots} trials at a time")
            if fresh:
                _set_aside(config)
            shutil.rmtree(config.folder / "ray", ignore_errors=True)  # an earlier driver's: the records are the truth
            _write_contract(config, identity)
            log_to(config.folder / "logs" / "driver.log")
            journal = Journal(config.results)
            past = list(journal.events())
            sources = ground.stand(config, sources, supply, room, announce, journal, past)
            records = retried(settle(journal, past), retry_failed)
            mending = threading.Lock()  # of slots that found the same damage, one has it mended

            def mend() -> None:
                with mending:
                    ground.mend(config, sources, supply, announce, journal)

            announce("starting workers (they load the models once, for all trials)")
            try:
                bar = Progress(config, console, planned_trials(phases, records), room.slots, records)
                with reading(sources), bar as progress:
                    least = room.plan.least_memory_bytes
                    run_trials(config, phases, sources, records, room.slots, progress, lost, least, mend, hours_of(past))
            finally:
                if not lost.is_set():
                    write_records(config.folder, fold(journal.events()))
                    uploads.publish(config.results, "trials.jsonl", "logs/driver.log")
        return 0
    except (SweepFailed, TargetsFailed, LeaseLost) as error:
        announce(f"error: {error}")
        return 1


def reading(sources: Any) -> contextlib.AbstractContextManager[None]:
    """Nobody prunes the store that trials read."""
    return inventory.in_use(sources.targets.place) if sources.targets is not None else contextlib.nullcontext()


def _report(config: SweepConfig, console: Any) -> None:
    """Guidelines and report from the records, as `python -m neo_ray.analyze` makes them."""
    from neo_ray import analyze
    from neo_ray.screen import show

    try:
        folder = uploads.local_copy(config.results)
        analysis = analyze.analyse(folder)
    except ValueError as error:
        console.print(f"no report yet: {error}", markup=False)
        return
    analyze.write(analysis, folder)
    uploads.publish(config.results, *uploads.REPORT)
    show(analysis, console)
    console.print(f"results: {config.results}", markup=False, highlight=False)


def _check_same_sweep(config: SweepConfig, fresh: bool) -> None:
    """A results folder belongs to one meaning of a trial; more trials or other resources extend it."""
    path = uploads.bring(config.results) / "sweep.yaml"
    if fresh or not path.exists():
        return
    old = loading.load(path)
    changed = differences(old, config)
    if changed:
        raise ConfigError(
            f"name: {config.results} holds a sweep whose trials mean something else ({'; '.join(changed)}); "
            "take another name, or --fresh to put that one aside"
        )


def _check_seeds(config: SweepConfig, fresh: bool) -> None:
    """Raises ConfigError where `confirm` has a seed that a trial in the results folder has had."""
    from neo_ray.records import Journal, fold

    if config.phases is not None and config.phases.confirm is not None and not fresh:
        check_seeds_are_fresh(phases_of(config), fold(Journal(config.results).events()))


def _check_earlier(config: SweepConfig) -> list[Warm]:
    """What the paths of `sampler.warm_start` hold, phase by phase. Raises ConfigError at one without records."""
    found: list[Warm] = []
    for phase in phases_of(config):
        with at_its_path(phase.name):
            found += warm_trials(phase.config, phase.space)
    return found


def _set_aside(config: SweepConfig) -> None:
    """`--fresh` deletes nothing."""
    folder, results = config.folder, config.results
    if not isinstance(results, Path):
        shutil.rmtree(folder, ignore_errors=True)
        uploads.set_aside(results)
        return
    aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    for path in list(folder.iterdir()):
        if not path.name.startswith((".lease", "lease")):
            aside.mkdir(exist_ok=True)
            shutil.move(str(path), aside / path.name)


def _write_contract(config: SweepConfig, sources: dict[str, str]) -> None:
    """`sweep.yaml`, `sources.json` and `environment.json`: what was asked for, of which data and weights, and where it ran."""
    from neo_ray.environment import environment
    from neo_ray.records import write_atomically

    write_atomically(config.folder / "sweep.yaml", loading.dump(config))
    write_atomically(config.folder / uploads.SOURCES_FILE, json.dumps(sources, indent=2))
    write_atomically(config.folder / "environment.json", json.dumps(environment(), indent=2))
    uploads.publish(config.results, *uploads.CONTRACT)


def command() -> None:
    """The door of the command line. A Ray that is still waited for ends with this process, and must not choose its exit code."""
    code = main()
    if "neo_ray.slot" in sys.modules and sys.modules["neo_ray.slot"].slots_wait():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for child in reversed(psutil.Process().children(recursive=True)):  # of a Ray that was started here
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        os._exit(code)  # at once: Ray would end this process with 1 when it finds its raylet gone
    sys.exit(code)


if __name__ == "__main__":
    command()
