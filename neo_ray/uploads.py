"""How does a results folder in an object store come to this disk, and how does what is written here go there?

Trials, reports and logs are written to a folder of this machine and uploaded; the journal and the lease are objects from the
start. Where results are kept in a local folder the two are one, and there is nothing to do.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from neo_ray import loading
from neo_ray.config import SweepConfig
from neo_ray.mistakes import guess
from neo_ray.records import Journal, TrialRecord, fold, load_records, write_atomically, write_records
from neo_ray.settings import ConfigError
from neo_ray.storage import RECORD, Damaged, Folder, Remote, alone, at, bring_folder, upload_folder

SOURCES_FILE = "sources.json"
"""In results: the `prepare.identities` of what the trials ran on."""
CONTRACT = ("sweep.yaml", SOURCES_FILE, "environment.json")
PATIENCE_AT_THE_DOOR = 30.0
"""Seconds for which a store may fail before a command says so: a mistake in its address looks like an outage."""
PATIENCE_WITH_COPIES = 10.0
"""Seconds for which a store may fail before a file that nothing depends on stays here."""
ITEMS = "suite.json"
"""In a trial's folder: the value of each item of a suite of benchmarks."""
ASKED = "benchmarks"
"""In results: `ITEMS` of models that are no trials, and of trials that were asked anew; a folder a suite, limit and model."""
REPORT = ("trials.jsonl", "guidelines.json", "report.md", "report.html", "best.yaml")


def working_folder(results: Folder) -> Path:
    """Where a machine writes what belongs to results."""
    return results if isinstance(results, Path) else results.here


def bring(results: Folder) -> Path:
    """The working folder, with the files that say what the sweep is as they are in the store."""
    folder = working_folder(results)
    if not isinstance(results, Path):
        for name in CONTRACT:
            try:
                (results / name).impatient(PATIENCE_AT_THE_DOOR).download(folder / name)
            except FileNotFoundError:
                (folder / name).unlink(missing_ok=True)
    return folder


def publish(results: Folder, *names: str) -> None:
    """Files of the working folder, those that there are."""
    if not isinstance(results, Path):
        for name in names:
            if (results.here / name).is_file():
                (results / name).upload(results.here / name)


def try_to_publish(results: Folder, *names: str) -> str | None:
    """`publish` of what only tells of a trial (logs, curves), and quickly: no trial waits for it. Why it failed, or None."""
    try:
        publish(results if isinstance(results, Path) else results.impatient(PATIENCE_WITH_COPIES), *names)
    except Exception as error:  # whatever a store can raise
        logging.getLogger("neo_ray").warning("not uploaded: %s: %s", ", ".join(names), error)
        return f"{type(error).__name__}: {error}"
    return None


def local_copy(place: str | Folder) -> Path:
    """What reads a results folder reads this one: sweep file, journal, records and items of a URL, or the folder itself."""
    results = at(place) if isinstance(place, str) else place
    if isinstance(results, Path):
        return results
    folder = bring(results)
    events = list(Journal(results).events())
    write_atomically(folder / "journal.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    records = fold(events)
    write_records(folder, records)
    for record in records:
        if record.state == "COMPLETE" and "suite" in record.details:
            _bring_items(results, f"trials/{record.id}/{ITEMS}")
    _bring_asked(results)
    return folder


def opened(place: Folder) -> tuple[Path, list[TrialRecord], SweepConfig]:
    """The folder to read, what its trials say, and its sweep.

    Raises:
        ConfigError: there is no such folder, or none of a sweep.
    """
    folder = local_copy(place)
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ConfigError(f"{folder}: there is no such results folder{guess(folder.name, near)}")
    try:
        records = load_records(folder)
    except ValueError as error:
        raise ConfigError(str(error) if place == folder else f"{place}: holds no sweep") from None
    return folder, records, loading.load(folder / "sweep.yaml")


def bring_untrained(results: Folder) -> None:
    """A worker takes the untrained student's scores from here; what is not in the store is of an earlier sweep of this name."""
    if not isinstance(results, Path):
        there = _bring_asked(results)
        for path in results.here.glob(f"{ASKED}/*/*/*/{ITEMS}"):
            if str(path.relative_to(results.here)) not in there:
                path.unlink(missing_ok=True)


def _bring_asked(results: Remote) -> list[str]:
    asked = results / ASKED
    models = [
        f"{ASKED}/{suite}/{limit}/{model}/{ITEMS}"
        for suite in asked.names()
        for limit in (asked / suite).names()
        for model in (asked / suite / limit).names()
    ]
    for name in models:
        _bring_items(results, name)
    return models


def _bring_items(results: Remote, name: str) -> None:
    try:
        (results / name).download(results.here / name)
    except FileNotFoundError:
        (results.here / name).unlink(missing_ok=True)


def bring_checkpoint(results: Folder, trial: str) -> None:
    """The working folder holds the newest checkpoint that was uploaded whole, and no other. Any rank may call it."""
    if isinstance(results, Path):
        return
    remote, local = results / "trials" / trial / "checkpoint", results.here / "trials" / trial / "checkpoint"
    newest = None
    with alone(local):
        for name in reversed(remote.names()):
            with suppress(Damaged):  # an older one, or none
                if bring_folder(remote / name, local / name):
                    newest = name
                    break
        for old in local.iterdir() if local.exists() else ():
            if old.is_dir() and old.name != newest:
                shutil.rmtree(old)


def publish_checkpoint(results: Folder, trial: str) -> None:
    """The trial's newest checkpoint, unless it is there; older ones go."""
    if isinstance(results, Path):
        return
    remote, local = results / "trials" / trial / "checkpoint", results.here / "trials" / trial / "checkpoint"
    found = sorted(path.parent for path in local.glob("step-*/state.json"))
    if not found or (remote / found[-1].name / RECORD).exists():
        return
    upload_folder(found[-1], remote / found[-1].name)
    for name in remote.names():
        if name != found[-1].name:
            (remote / name).remove()


def publishing(results: Folder, trial: str, report: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """A report that is made once the checkpoint that goes with it is uploaded."""

    def after_upload(row: dict[str, Any]) -> None:
        publish_checkpoint(results, trial)
        report(row)

    return after_upload


def publish_end(results: Folder, trial: str, state: str) -> None:
    """What a trial leaves: its adapter, or a checkpoint to go on from."""
    if isinstance(results, Path):
        return
    here = results.here / "trials" / trial
    if state == "INTERRUPTED":
        publish_checkpoint(results, trial)
        return
    if state == "COMPLETE" and (here / "adapter").is_dir():
        upload_folder(here / "adapter", results / "trials" / trial / "adapter")
    if state == "COMPLETE" and (here / ITEMS).is_file():
        (results / "trials" / trial / ITEMS).upload(here / ITEMS)
        publish(results, *(str(path.relative_to(results.here)) for path in results.here.glob(f"{ASKED}/*/*/*/{ITEMS}")))
    shutil.rmtree(here / "checkpoint", ignore_errors=True)  # the one in the store stays until the end is in the journal


def drop_checkpoint(results: Folder, trial: str) -> None:
    """A finished trial needs none."""
    if not isinstance(results, Path):
        (results / "trials" / trial / "checkpoint").remove()


def check(place: Remote, key: str) -> None:
    """Raises ConfigError where nothing can be written to a place."""
    probe = place.impatient(10) / f".probe-{uuid.uuid4().hex}"
    try:
        probe.write_text("")
        probe.remove()
    except ImportError as error:
        raise ConfigError(f"{key}: {place}: {error}") from None
    except Exception as error:
        raise ConfigError(f"{key}: {place} cannot be written ({type(error).__name__}: {error})") from None


def set_aside(results: Remote) -> None:
    """All but the lease, beside it under the time of day."""
    aside = results.with_name(f"{results.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    for name in results.names():
        if not name.startswith("lease"):
            (results / name).move_to(aside / name)
