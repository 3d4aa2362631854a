"""What did distillation bring on benchmarks? `python -m neo_ray.evaluate results/<name>`: teacher, student, trials side by side.

Rows are kept in `<results>/benchmarks/` as they are done: the same command goes on where it was, and asks no model twice.
Exit codes: 0 written, 2 a mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_ray import door, loading
from neo_ray.config import SweepConfig
from neo_ray.mistakes import guess
from neo_ray.records import TrialRecord, load_records, write_atomically
from neo_ray.searching import of_suite
from neo_ray.settings import ConfigError, EvaluationConfig

if TYPE_CHECKING:
    import torch

    from neo_ray.harness import Opened, SuiteScores
    from neo_ray.parts import Sources

TEACHER, STUDENT = "teacher", "student"


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    """`teacher`, `student` (untrained), or a trial's id."""
    about: str
    scores: SuiteScores
    record: TrialRecord | None = None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m neo_ray.evaluate", description="Ask teacher, untrained student and trials the benchmarks of a suite."
    )
    parser.add_argument("path", type=Path, help="a results folder (results/<name>)")
    parser.add_argument("--suite", help="quickstart, neo10, a YAML file or a folder; the sweep's own by default")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task, its first ones; all by default")
    parser.add_argument("--trial", action="append", metavar="ID", help="which trials; the best of each method by default")
    asked = parser.parse_args(argv)
    with door.end(interrupted="interrupted; the models that were asked are kept") as end:
        folder = asked.path.expanduser()
        rows = evaluate(folder, asked.suite, asked.limit, asked.trial)
        text = markdown(rows, of_suite(loading.load(folder / "sweep.yaml").objective.metric))
        target = folder / "benchmarks" / f"{rows[0].scores.suite.replace(' ', '-')}.md"
        write_atomically(target, text)
        print(text)
        print(target)
    return end.code


def evaluate(folder: Path, suite: str | None = None, limit: int | None = None, trials: Sequence[str] | None = None) -> list[Row]:
    """Scores of the teacher, the untrained student, and the trials.

    Args:
        folder: of results.
        suite: another than the sweep's own.
        limit: items of a task; with a suite of the sweep's own: its own.
        trials: ids; by default of each method the best one.

    Raises:
        ConfigError: no such folder, suite or trial, or models or tasks cannot be had.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: {limit} must be at least 1")
    sweep = _with_suite(loading.load(folder / "sweep.yaml"), suite, limit)
    try:
        records = load_records(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    chosen = [_named(records, wanted) for wanted in trials] if trials else _best_of_each_method(records, sweep)
    for record in chosen:
        _check(folder, record)
    from neo_ray import harness
    from neo_ray.prepare import check_same_sources, identities, make_student, prepare

    prepared = prepare(sweep, print)
    own = {name: what for name, what in identities(sweep, prepared).items() if name != "evaluation.suite"}
    check_same_sources(folder, own, "an adapter goes with what it was trained on: bring that back")
    sources = make_student(sweep, prepared, print)
    assert sources.suite is not None
    opened = harness.open_suite(Path(sources.suite), sweep.evaluation.suite_limit)
    asking = _Asking(folder, sweep, sources, opened)
    rows = [asking.row(TEACHER, "the teacher")] if sources.teacher is not None else []
    rows.append(asking.row(STUDENT, "the student, untrained"))
    return [*rows, *(asking.row(record.id, f"{_method(record)}, trial {record.id}", record) for record in chosen)]


@dataclass(frozen=True)
class _Asking:
    folder: Path
    sweep: SweepConfig
    sources: Sources
    opened: Opened

    def row(self, name: str, about: str, record: TrialRecord | None = None) -> Row:
        """From the file of an earlier asking, or of the trial itself; otherwise the model is asked."""
        from neo_ray import benchmarks

        assert self.sources.suite is not None
        kept = self.folder / "benchmarks" / Path(self.sources.suite).name / _folder_of(self.sweep.evaluation.suite_limit) / name
        trained = self.folder / "trials" / name / benchmarks.ITEMS
        for path in (kept / benchmarks.ITEMS, trained):
            if path.is_file() and (path != trained or self._is_of_this_sweep()):
                found = benchmarks.read(path)
                asked = (self.opened.suite.title, self.sweep.evaluation.suite_limit, str(self._dtype))
                if (found.suite, found.limit, found.dtype) == asked:
                    return Row(name, about, found, record)
        print(f"asking {about}")
        scores = self._ask(name)
        kept.mkdir(parents=True, exist_ok=True)
        benchmarks.save(scores, kept)
        return Row(name, about, scores, record)

    @property
    def _dtype(self) -> torch.dtype:
        from neo_ray import devices

        return devices.resolve_dtype(self.sweep.training.dtype, devices.local_device())

    def _is_of_this_sweep(self) -> bool:
        """Was the very suite asked during the trials?"""
        sources = json.loads((self.folder / "sources.json").read_text(encoding="utf-8"))
        return self.sources.suite is not None and sources.get("evaluation.suite") == Path(self.sources.suite).name

    def _ask(self, name: str) -> SuiteScores:
        import peft

        from neo_ray import devices, harness, models
        from neo_ray.parts import load_source

        device = devices.local_device()
        source = self.sources.teacher if name == TEACHER else self.sources.student
        assert source is not None
        where = f"{TEACHER if name == TEACHER else STUDENT}.model"
        model: Any = load_source(source, self._dtype, device, where)
        if name not in (TEACHER, STUDENT):
            model = peft.PeftModel.from_pretrained(model, str(self.folder / "trials" / name / "adapter"))
        tokenizer = models.load_tokenizer(source.path, source.revision, source.trust_remote_code, where)
        size, limit = self.sweep.evaluation.batch_size, self.sweep.evaluation.suite_limit
        scores = harness.ask(self.opened, model, tokenizer, self.sources.vocabulary, device, self._dtype, size, limit)
        del model
        devices.free_memory(device)
        return scores


CHOSEN_BY_IT = (
    "The sweep looked for its trials by benchmarks: on the items that chose it, the best trial looks better than it is.\n"
)


def markdown(rows: Sequence[Row], chosen_by_it: bool = False) -> str:
    """The table: each benchmark and the average with its standard error, the paired difference to the untrained student."""
    first = rows[0].scores
    base = next(row for row in rows if row.name == STUDENT)
    header = ["model", *first.items, "average", "against the student [95 %]", "p", "peak GB", "seconds"]
    lines = [_line(row, base) for row in rows]
    some = "all items" if first.limit is None else f"the first {first.limit} items of each task"
    words = [
        f"# {first.suite}: {some}\n",
        "Per cent, with the standard error over items; the average is the unweighted mean of the benchmarks. Differences are of "
        "averages, item by item: 95 % bootstrap interval over items, p by random signs (McNemar's exact test of one benchmark). "
        "Memory and seconds are those of the trial's training.\n",
        *([CHOSEN_BY_IT] if chosen_by_it else []),
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" for _ in header) + " |",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]
    return "\n".join(words) + "\n"


def _line(row: Row, base: Row) -> list[str]:
    from neo_ray import paired

    values, errors, scores = row.scores.values, row.scores.errors, row.scores
    cells = [row.about, *(f"{100 * values[name]:.1f} ± {100 * errors[name]:.1f}" for name in values)]
    cells.append(f"{100 * scores.average:.1f} ± {100 * scores.error:.1f}")
    if row is base:
        cells += ["", ""]
    else:
        found = paired.compare(scores.items, base.scores.items)
        cells += [f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]", f"{found.p:.2g}"]
    record = row.record
    peak = f"{record.peak_memory_bytes / 1e9:.2f}" if record is not None and record.peak_memory_bytes else ""
    return [*cells, peak, f"{record.seconds:.0f}" if record is not None else ""]


def _with_suite(sweep: SweepConfig, suite: str | None, limit: int | None) -> SweepConfig:
    settings = sweep.evaluation
    name = suite or settings.suite
    if name is None:
        from neo_ray.suites import shipped

        raise ConfigError(
            f"--suite: the sweep has no suite of its own; give one: {', '.join(shipped())}, a YAML file or a folder"
        )
    kept = settings.suite_limit if suite is None and limit is None else limit
    changed = EvaluationConfig(**{**settings.model_dump(), "suite": name, "suite_limit": kept})
    return sweep.model_copy(
        update={"evaluation": changed, "resources": sweep.resources.model_copy(update={"workers_per_trial": 1})}
    )


def _best_of_each_method(records: Sequence[TrialRecord], sweep: SweepConfig) -> list[TrialRecord]:
    from neo_ray.evidence import gather
    from neo_ray.report import ranked

    complete = [r for r in records if r.state == "COMPLETE" and _method(r) in ("lora", "neo")]
    best: dict[str, TrialRecord] = {}
    found = gather(records, sweep).best  # where a study was confirmed, that is its answer
    ordered = ranked(complete, sweep.objective.metric, sweep.objective.mode)
    for record in sorted(ordered, key=lambda record: found is None or record.id != found.id):
        best.setdefault(_method(record), record)
    return list(best.values())


def _method(record: TrialRecord) -> str:
    return str(record.config.get("method", "neo"))


def _named(records: Sequence[TrialRecord], wanted: str) -> TrialRecord:
    known = {record.id: record for record in records}
    if wanted not in known:
        raise ConfigError(f"--trial: there is no trial {wanted}{guess(wanted, known)}")
    return known[wanted]


def _check(folder: Path, record: TrialRecord) -> None:
    if not (folder / "trials" / record.id / "adapter" / "adapter_config.json").is_file():
        raise ConfigError(f"--trial: trial {record.id} ({record.state}, {_method(record)}) has no adapter to ask")


def _folder_of(limit: int | None) -> str:
    return "all" if limit is None else f"first-{limit}"


if __name__ == "__main__":
    sys.exit(main())
