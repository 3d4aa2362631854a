"""What have others measured? Trial records from a table (CSV, JSONL), an Optuna study or a Ray Tune experiment folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from neo_ray.mistakes import guess
from neo_ray.records import State, TrialRecord
from neo_ray.statistics import COLUMNS
from neo_ray.trials import setting_key

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
DATABASES = ("sqlite", "postgresql", "mysql")
STATES: dict[str, State] = {
    **dict.fromkeys(("complete", "completed", "finished", "done", "terminated", "success", "ok"), "COMPLETE"),
    **dict.fromkeys(("pruned", "stopped", "early_stopped"), "PRUNED"),
    **dict.fromkeys(("fail", "failed", "error", "crashed", "killed"), "FAILED"),
    **dict.fromkeys(("running", "waiting", "pending", "paused"), "RUNNING"),
}
COST = {"seconds": ("seconds", "runtime", "duration", "time_total_s", "_runtime"), "tokens": ("tokens",)}
"""Field of a record → columns that may hold it."""
PARAMS, RESULTS = "\0params", "\0results"
"""Of a trial of Ray Tune's, beside its columns: what was tried, and every result."""


@dataclass(frozen=True)
class Columns:
    """Which columns are what."""

    params: Mapping[str, str] = field(default_factory=dict)
    """Name of a parameter → its column; `seed` is the seed."""
    metric: str | None = None
    mode: str = "min"
    group: str | None = None


@dataclass(frozen=True)
class Group:
    """Trials that belong together."""

    name: str
    records: list[TrialRecord]
    metric: str
    mode: str
    notes: list[str]
    """What they were read from, and what could not be read."""

    @property
    def folder(self) -> str:
        """A name that a folder can have."""
        return "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in self.name).lstrip(".") or "trials"


def is_foreign(path: str, asked: Columns) -> bool:
    """Is this something else than a results folder of neo_ray?"""
    place = Path(path).expanduser()
    if is_database(path) or place.suffix in (".csv", ".tsv") or asked.metric is not None:
        return True
    return place.is_dir() and not _ours(place) and any(place.glob("experiment_state-*.json"))


def is_database(path: str) -> bool:
    return "://" in path and path.partition(":")[0].partition("+")[0] in DATABASES


def place_of(path: str) -> Path:
    """Where the report of such a place is written: beside a file or folder, and here for a database."""
    if is_database(path):
        return Path(f"{Path(path.rpartition('/')[2]).stem}-report")
    place = Path(path).expanduser()
    return place.with_name(f"{place.stem}-report")


def read(path: str, asked: Columns) -> list[Group]:
    """The trials of one place, by group.

    Raises:
        ValueError: nothing there is a trial, or a column that was asked for is not there.
    """
    if is_database(path):
        return [_study(study, asked) for study in _studies(path)]
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"{path}: no such file or folder")
    if place.is_dir() and _ours(place):
        raise ValueError(f"{path}: a results folder of neo_ray says itself what was ranked by; leave out --metric")
    rows, bad = _experiment(place) if place.is_dir() else _table(place)
    if not rows:
        raise ValueError(f"{path}: holds no row that could be a trial")
    if place.is_dir() and not asked.params:
        asked = replace(asked, params={name: name for row in rows for name in row[PARAMS]})
    return _groups(place.stem, rows, bad, asked)


def _ours(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("journal.jsonl", "trials.jsonl"))


def _table(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows, nested ones with dots in their names, and how many lines are none."""
    if path.suffix in (".csv", ".tsv"):
        raw = path.read_bytes()
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")  # how a spreadsheet saves "Unicode text"
        text = raw.decode("utf-16" if wide else "utf-8-sig", errors="replace").replace("\0", "")
        csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
        reader = csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")
        rows = [{k: _value(v) for k, v in row.items() if k and not isinstance(v, list)} for row in reader]
        good = [row for row in rows if any(value is not None for value in row.values())]
        return good, len(rows) - len(good)
    rows, bad = [], 0
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            found = False
        if isinstance(found, dict):
            rows.append(_flat(found))
        elif found is not None:
            bad += 1
    return rows, bad


def _experiment(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """A row a trial of a Ray Tune experiment: its parameters, and its last result on top. Read without ray.

    Tune calls a trial that a scheduler stopped TERMINATED, as one that ended: one with fewer results than others have counts as
    stopped early.
    """
    rows, bad, statuses = [], 0, _statuses(folder)
    for place in sorted(path.parent for path in folder.glob("*/params.json")):
        try:
            params = _flat(json.loads((place / "params.json").read_text(encoding="utf-8")))
        except (ValueError, OSError, AttributeError):
            bad += 1
            continue
        result = place / "result.json"
        results = _table(result)[0] if result.exists() else []
        last = {k: v for k, v in (results[-1] if results else {}).items() if not k.startswith("config.")}
        id = str(last.get("trial_id", place.name))
        state = "error" if (place / "error.txt").exists() else statuses.get(id, "complete" if results else "pending")
        rows.append({**params, **last, "state": state, "id": id, PARAMS: params, RESULTS: results})
    most = max((len(row[RESULTS]) for row in rows if STATES.get(row["state"]) == "COMPLETE"), default=0)
    for row in rows:
        if STATES.get(row["state"]) == "COMPLETE" and len(row[RESULTS]) < most:
            row["state"] = "pruned"
    return rows, bad


def _statuses(folder: Path) -> dict[str, str]:
    """Trial id → TERMINATED, ERROR, RUNNING, PENDING or PAUSED, of the last time that the experiment ran."""
    try:
        file = max(folder.glob("experiment_state-*.json"))
        trials = [json.loads(pair[0]) for pair in json.loads(file.read_text(encoding="utf-8"))["trial_data"]]
        return {trial["trial_id"]: trial["status"].lower() for trial in trials}
    except (ValueError, OSError, LookupError, TypeError, AttributeError):
        return {}


def _groups(name: str, rows: list[dict[str, Any]], bad: int, asked: Columns) -> list[Group]:
    columns = [column for column in dict.fromkeys(column for row in rows for column in row) if column not in (PARAMS, RESULTS)]
    if asked.metric is None:
        raise ValueError(f"{name}: say what is ranked by: --metric COLUMN (columns: {_some(columns)})")
    if not asked.params:
        raise ValueError(f"{name}: say which columns are parameters: --param rank=COLUMN, for each (columns: {_some(columns)})")
    if asked.metric in asked.params or asked.metric in asked.params.values() or "" in asked.params:
        raise ValueError(f"{name}: a parameter has a name, and is not {asked.metric}, which is ranked by")
    for column in [asked.metric, *asked.params.values(), *([asked.group] if asked.group else [])]:
        if column not in columns:
            raise ValueError(f"{name}: has no column {column}{guess(column, columns)} (columns: {_some(columns)})")
    if "seed" in columns and "seed" not in asked.params.values() and asked.metric != "seed":
        asked = replace(asked, params={**asked.params, "seed": "seed"})
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        value = row.get(asked.group) if asked.group else None
        groups.setdefault(name if value is None else str(value), []).append(row)
    notes = [f"{bad} line{'s' if bad > 1 else ''} of it could not be read as a trial."] if bad else []
    return [_group(group, those, notes, asked) for group, those in groups.items()]


def _group(name: str, rows: list[dict[str, Any]], notes: list[str], asked: Columns) -> Group:
    metric = _named_apart(asked.metric or "")
    records = _named([_record(number, row, asked, metric) for number, row in enumerate(rows)])
    records, repeats = (records, 0) if "seed" in asked.params else _repeated(records)
    mapping = ", ".join(f"{name} from {column}" for name, column in asked.params.items())
    source = f"The trials come from a table: {mapping}; ranked by {asked.metric}. What chose their settings is not known."
    notes = [source, *notes]
    unknown = sorted({state for row in rows if (state := _state(row)) not in STATES})
    notes += [f"States that are not known count as complete: {', '.join(unknown[:5])}."] if unknown else []
    notes += [f"No column is the seed: {repeats} trials count as repeats of a setting with another seed."] if repeats else []
    stopped = sum(record.state == "PRUNED" for record in records) if PARAMS in rows[0] else 0
    notes += [f"{stopped} trials have fewer results than the others and count as stopped early."] if stopped else []
    return Group(name, records, metric, asked.mode, notes)


def _record(number: int, row: dict[str, Any], asked: Columns, metric: str) -> TrialRecord:
    given = {name: row.get(column) for name, column in asked.params.items()}
    params = {k: v for k, v in given.items() if v is not None and not (_is_number(v) and _finite(v) is None)}
    seed, value = params.pop("seed", 0), row.get(asked.metric or "")
    state, cause, error = STATES.get(_state(row), "COMPLETE"), None, None
    if state == "FAILED":
        cause = "error"
    elif state == "COMPLETE" and _finite(value) is None:
        state, cause = "FAILED", "diverged" if isinstance(value, int | float) else "error"
        error = f"{asked.metric} is {'missing' if value is None else 'not finite' if cause == 'diverged' else 'no number'}"
    results = enumerate(row.get(RESULTS, ()), 1)
    return TrialRecord(
        id=str(row.get("id", row.get("trial_id", row.get("trial", number)))),
        state=state,
        cause=cause,  # type: ignore[arg-type]
        error=error,
        phase="map",
        params=params,
        seed=_seed(seed),
        metrics={metric: _finite(value)},
        curve=[{"rung": i, "step": i, metric: _finite(result.get(asked.metric or ""))} for i, result in results],
        seconds=_number(row, COST["seconds"]),
        tokens=int(_number(row, COST["tokens"])),
        accelerator_seconds=_number(row, ("accelerator_seconds",)),
        peak_memory_bytes=int(_number(row, ("peak_memory_bytes",))),
    )


def _state(row: Mapping[str, Any]) -> str:
    return str(row.get("state", row.get("status")) or "complete").lower()


def _named_apart(metric: str) -> str:
    """A metric that is called as a column of ours (seconds, tokens) has a name of its own."""
    return f"metric.{metric}" if metric in COLUMNS else metric


def _seed(value: Any) -> int:
    """Whole numbers stand for themselves; other seeds, as names, only have to differ."""
    whole = _is_number(value) and abs(value) < 2**53 and value == int(value)
    return int(value) if whole else crc32(str(value).encode("utf-8", "replace"))


def _repeated(records: list[TrialRecord]) -> tuple[list[TrialRecord], int]:
    """Trials of one setting with seeds that differ, and how many are not the first of theirs."""
    seen: dict[str, int] = {}
    found = []
    for record in records:
        key = setting_key(record.params)
        found.append(record.model_copy(update={"seed": seen.get(key, 0)}))
        seen[key] = seen.get(key, 0) + 1
    return found, len(records) - len(seen)


def _named(records: list[TrialRecord]) -> list[TrialRecord]:
    """With ids that differ: those of the table where they do, else the numbers of its rows."""
    if len({record.id for record in records}) == len(records):
        return records
    return [record.model_copy(update={"id": str(number)}) for number, record in enumerate(records)]


def _studies(url: str) -> list[Any]:
    """Of a database that is there: Optuna would make an empty one."""
    import optuna
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = Path(url.partition(":///")[2]) if url.startswith("sqlite:///") else None
    if file is not None and not file.is_file():
        raise ValueError(f"{url}: no such file")
    try:
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True)
        names = [study.study_name for study in storage.get_all_studies()]
        studies = [optuna.load_study(study_name=name, storage=storage) for name in names]
    except (SQLAlchemyError, OptunaError, ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"{url}: is no database of Optuna studies ({type(error).__name__})") from None
    found = [study for study in studies if study.get_trials(deepcopy=False)]
    if not found:
        raise ValueError(f"{url}: holds no study with a trial")
    return found


def _study(study: Any, asked: Columns) -> Group:
    """An Optuna study of one objective as a group; its parameters are taken by their own names where none is mapped."""
    if len(study.directions) > 1:
        raise ValueError(f"study {study.study_name}: has {len(study.directions)} objectives; one can be analysed")
    metric = _named_apart(asked.metric or (study.metric_names or ["value"])[0])
    names = {column: name for name, column in asked.params.items()}
    records = [_of_optuna(trial, metric, names) for trial in study.get_trials(deepcopy=False)]
    mode = "max" if study.direction.name == "MAXIMIZE" else "min"
    return Group(study.study_name, records, metric, mode, [f"The trials come from the Optuna study {study.study_name}."])


def _of_optuna(trial: Any, metric: str, names: Mapping[str, str]) -> TrialRecord:
    params = {names.get(name, name): value for name, value in trial.params.items()}
    seed = params.pop("seed", 0)
    value = trial.value if trial.state.name == "COMPLETE" else None
    state = STATES[trial.state.name.lower()]
    curve = [{"rung": i + 1, "step": step, metric: v} for i, (step, v) in enumerate(sorted(trial.intermediate_values.items()))]
    return TrialRecord(
        id=str(trial.number),
        state=state,
        cause="error" if state == "FAILED" else None,
        phase="explore",
        params=params,
        seed=seed if isinstance(seed, int) else 0,
        metrics={metric: value if value is not None else curve[-1][metric] if curve else None},
        curve=curve,
        seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        started=trial.datetime_start.timestamp() if trial.datetime_start else None,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
    )


def _flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested objects as columns with dots in their names; lists stand as they are."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{before}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _value(text: str | None) -> Any:
    """A cell of a CSV as a number where it reads as one, None where it is empty."""
    text = (text or "").strip()
    if not text:
        return None
    if "_" in text:
        return text  # Python would read 1_0 as ten
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    """A number whose square can be had; None for anything else."""
    return float(value) if _is_number(value) and abs(value) < 1e150 else None


def _number(row: Mapping[str, Any], columns: Iterable[str]) -> float:
    known = (value for column in columns if (value := _finite(row.get(column))) is not None)
    return max(0.0, next(known, 0.0))


def _some(columns: Sequence[str]) -> str:
    return ", ".join(columns[:30]) + (f" and {len(columns) - 30} more" if len(columns) > 30 else "")
