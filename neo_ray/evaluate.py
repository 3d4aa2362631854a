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
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_ray import door, uploads
from neo_ray.config import SweepConfig
from neo_ray.records import TrialRecord, write_atomically
from neo_ray.scores import STUDENT, TEACHER, SuiteScores, place, read, save
from neo_ray.searching import of_suite
from neo_ray.settings import ConfigError
from neo_ray.storage import Folder, at, bring_folder
from neo_ray.trials import find_trial
from neo_ray.uploads import ASKED, ITEMS, SOURCES_FILE

if TYPE_CHECKING:
    import torch

    from neo_ray.harness import Opened
    from neo_ray.paired import Difference
    from neo_ray.parts import Sources


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    """`teacher`, `student` (untrained), or a trial's id."""
    about: str
    scores: SuiteScores
    record: TrialRecord | None = None


@dataclass(frozen=True)
class Table:
    rows: list[Row]
    left_out: Sequence[str] = ()
    """Trials and methods that are no rows, and why."""
    chosen_by_it: bool = False
    """Was the best of a method chosen by benchmarks?"""


NO_WEIGHTS = (
    "keeps no weights, and no scores of this suite with this limit and precision (evaluation.suite takes them at its end)"
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m neo_ray.evaluate", description="Ask teacher, untrained student and trials the benchmarks of a suite."
    )
    parser.add_argument("path", help="a results folder (results/<name>), or its URL")
    parser.add_argument("--suite", help="quickstart, neo10, a YAML file or a folder; the sweep's own by default")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task, its first ones; all by default")
    parser.add_argument("--trial", action="append", metavar="ID", help="which trials; the best of each method by default")
    asked = parser.parse_args(argv)
    with door.end(interrupted="interrupted; the models that were asked are kept") as end:
        results = at(asked.path)
        table = evaluate(results, asked.suite, asked.limit, asked.trial)
        text, folder = markdown(table), uploads.working_folder(results)
        target = f"{ASKED}/{table.rows[0].scores.suite.replace(' ', '-')}.md"
        write_atomically(folder / target, text)
        uploads.publish(results, target)
        print(text)
        print(results / target)
    return end.code


def evaluate(results: Folder, suite: str | None = None, limit: int | None = None, trials: Sequence[str] | None = None) -> Table:
    """Scores of the teacher, the untrained student, and the trials.

    Trials of `sft` and `kd` keep no weights: theirs are those that the sweep itself took, where it did.

    Args:
        results: their folder, or its place in an object store.
        suite: another than the sweep's own.
        limit: items of a task; with a suite of the sweep's own: its own.
        trials: ids; by default of each method the best one.

    Raises:
        ConfigError: no such folder, suite or trial, or models or tasks cannot be had.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: {limit} must be at least 1")
    folder, records, sweep = uploads.opened(results)
    wanted = [find_trial(folder, records, one) for one in trials or ()]
    trained = [r for r in records if r.state == "COMPLETE" and _method(r) in ("lora", "neo")]
    lost = [] if wanted or any(_can_be_asked(results, folder, r) for r in trained) else trained[:1]
    for record in wanted or lost:
        _check(results, folder, record)
    name, limit = _which_suite(sweep, suite, limit)
    from neo_ray import harness
    from neo_ray.prepare import check_same_sources, for_scoring, identities, make_student, prepare

    alone = for_scoring(sweep, name, limit)
    prepared = prepare(alone, print)
    own = {name: what for name, what in identities(alone, prepared).items() if name != "evaluation.suite"}
    check_same_sources(folder, own, "an adapter goes with what it was trained on: bring that back")
    sources = make_student(alone, prepared, print)
    assert sources.suite is not None
    asking = _Asking(results, folder, alone, sources, harness.open_suite(Path(sources.suite), limit))
    found, left_out = (wanted, [f"{_about(r)}: {NO_WEIGHTS}" for r in wanted if not asking.may(r)])
    if not trials:
        found, left_out = _best_of_each_method(records, sweep, asking)
    for line in left_out:
        print(f"left out: {line}")
    rows = [asking.row(TEACHER, "the teacher")] if sources.teacher is not None else []
    rows.append(asking.row(STUDENT, "the student, untrained"))
    rows += [asking.row(record.id, _about(record), record) for record in found if asking.may(record)]
    return Table(rows, left_out, of_suite(sweep.objective.metric))


@dataclass(frozen=True)
class _Asking:
    results: Folder
    folder: Path
    """The results, on this machine."""
    sweep: SweepConfig
    sources: Sources
    opened: Opened

    def row(self, name: str, about: str, record: TrialRecord | None = None) -> Row:
        """From the file of an earlier asking, or of the trial itself; otherwise the model is asked."""
        found = self.kept(name)
        if found is None:
            print(f"asking {about}")
            found = self._ask(name)
            save(found, self._place(name))
            uploads.publish(self.results, str((self._place(name) / ITEMS).relative_to(self.folder)))
        return Row(name, about, found, record)

    def may(self, record: TrialRecord) -> bool:
        """Can scores of a trial be had: are they kept, or its weights?"""
        return self.kept(record.id) is not None or _has_adapter(self.results, record)

    def kept(self, name: str) -> SuiteScores | None:
        """What a model was asked before, if it was this suite with this limit and in this precision."""
        trained = self.folder / "trials" / name
        for folder in (self._place(name), *([trained] if self._is_of_this_sweep() else [])):
            if (folder / ITEMS).is_file():
                found = read(folder / ITEMS)
                asked = (self.opened.suite.title, self.sweep.evaluation.suite_limit, str(self._dtype))
                if (found.suite, found.limit, found.dtype) == asked:
                    return found
        return None

    def _place(self, name: str) -> Path:
        assert self.sources.suite is not None
        return place(self.folder, self.sources.suite, self.sweep.evaluation.suite_limit, name)

    @property
    def _dtype(self) -> torch.dtype:
        from neo_ray import devices

        return devices.resolve_dtype(self.sweep.training.dtype, devices.local_device())

    def _is_of_this_sweep(self) -> bool:
        """Was the very suite asked during the trials?"""
        path = self.folder / SOURCES_FILE
        sources = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
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
            adapter = self.folder / "trials" / name / "adapter"
            if not isinstance(self.results, Path):
                bring_folder(self.results / "trials" / name / "adapter", adapter)
            model = peft.PeftModel.from_pretrained(model, str(adapter))
        tokenizer = models.load_tokenizer(source.path, source.revision, source.trust_remote_code, where)
        size, limit = self.sweep.evaluation.batch_size, self.sweep.evaluation.suite_limit
        scores = harness.ask(self.opened, model, tokenizer, self.sources.vocabulary, device, self._dtype, size, limit)
        del model
        devices.free_memory(device)
        return scores


CHOSEN_BY_IT = (
    "The sweep looked for its trials by benchmarks: on the items that chose it, the best trial looks better than it is.\n"
)


def markdown(table: Table) -> str:
    """The table: each benchmark and the average with its standard error, the paired difference to the untrained student."""
    rows, first = table.rows, table.rows[0].scores
    base = next(row for row in rows if row.name == STUDENT)
    header = ["model", *first.items, "average", "against the student [95 %]", "p", "peak GB", "seconds", "suite seconds"]
    lines = [_line(row, base) for row in rows]
    some = "all items" if first.limit is None else f"the first {first.limit} items of each task"
    words = [
        f"# {first.suite}: {some}\n",
        "Per cent, with the standard error over items; the average is the unweighted mean of the benchmarks. Differences are of "
        "averages, item by item: 95 % bootstrap interval over items, p by random signs (McNemar's exact test of one benchmark). "
        "Memory and seconds are those of the trial's training, without the benchmarks at its end; suite seconds those of "
        "asking, without loading the model.\n",
        *([CHOSEN_BY_IT] if table.chosen_by_it else []),
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" for _ in header) + " |",
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
        *(f"- {_in_words(better, worse)}" for better, worse in combinations(_ranked(rows), 2)),
        *(f"- Left out: {line}." for line in table.left_out),
    ]
    return "\n".join(words) + "\n"


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """The teacher, the trials by their averages, the untrained student: as a distillation should leave them."""
    place = {TEACHER: 0, STUDENT: 2}
    return sorted(rows, key=lambda row: (place.get(row.name, 1), -row.scores.average))


def _in_words(first: Row, second: Row) -> str:
    from neo_ray import paired

    found = paired.compare(first.scores.items, second.scores.items)
    told = "better than" if found.low > 0 else "worse than" if found.high < 0 else "not told apart from"
    if found.p >= 0.05:
        told = "not told apart from"
    return (
        f"Item by item, {first.about} is {told} {second.about}: {_points(found)} points, p {found.p:.2g}, better on "
        f"{found.better} items and worse on {found.worse}."
    )


def _points(found: Difference) -> str:
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _line(row: Row, base: Row) -> list[str]:
    from neo_ray import paired

    values, errors, scores = row.scores.values, row.scores.errors, row.scores
    cells = [row.about, *(f"{100 * values[name]:.1f} ± {100 * errors[name]:.1f}" for name in values)]
    cells.append(f"{100 * scores.average:.1f} ± {100 * scores.error:.1f}")
    if row is base:
        cells += ["", ""]
    else:
        found = paired.compare(scores.items, base.scores.items)
        cells += [_points(found), f"{found.p:.2g}"]
    record = row.record
    asked = f"{scores.seconds:.0f}" if scores.seconds is not None else ""
    if record is None:
        return [*cells, "", "", asked]
    peak = f"{record.peak_memory_bytes / 1e9:.2f}" if record.peak_memory_bytes else ""
    return [*cells, peak, f"{record.seconds - (record.details.get('suite_seconds') or 0.0):.0f}", asked]


def _which_suite(sweep: SweepConfig, suite: str | None, limit: int | None) -> tuple[str, int | None]:
    settings = sweep.evaluation
    name = suite or settings.suite
    if name is None:
        from neo_ray.suites import shipped

        raise ConfigError(
            f"--suite: the sweep has no suite of its own; give one: {', '.join(shipped())}, a YAML file or a folder"
        )
    return name, settings.suite_limit if suite is None and limit is None else limit


def _best_of_each_method(
    records: Sequence[TrialRecord], sweep: SweepConfig, asking: _Asking
) -> tuple[list[TrialRecord], list[str]]:
    """Of each method the best COMPLETE trial whose scores can be had; and what stands for no method, in words."""
    from neo_ray.evidence import gather
    from neo_ray.report import ranked

    best = gather(records, sweep).best  # where a study was confirmed, that is its answer
    ordered = ranked(records, sweep.objective.metric, sweep.objective.mode)
    ordered.sort(key=lambda record: best is None or record.id != best.id)
    chosen, left_out = [], []
    for method in dict.fromkeys(map(_method, ordered)):
        complete = [record for record in ordered if _method(record) == method and record.state == "COMPLETE"]
        found = next(filter(asking.may, complete), None)
        if not complete:
            left_out.append(f"{method}: none of its trials is COMPLETE")
        elif found is not complete[0]:
            instead = f"; {_about(found)} stands for {method}" if found else ""
            left_out.append(f"{_about(complete[0])}, its best: {NO_WEIGHTS}{instead}")
        chosen += [found] if found else []
    return chosen, left_out


def _method(record: TrialRecord) -> str:
    return str(record.config.get("method", "neo"))


def _about(record: TrialRecord) -> str:
    return f"{_method(record)}, trial {record.id}"


def _has_adapter(results: Folder, record: TrialRecord) -> bool:
    return (results / "trials" / record.id / "adapter" / "adapter_config.json").exists()


def _can_be_asked(results: Folder, folder: Path, record: TrialRecord) -> bool:
    return _has_adapter(results, record) or (folder / "trials" / record.id / ITEMS).is_file()


def _check(results: Folder, folder: Path, record: TrialRecord) -> None:
    if not _can_be_asked(results, folder, record):
        raise ConfigError(f"--trial: trial {record.id} ({record.state}, {_method(record)}) has no adapter to ask")


if __name__ == "__main__":
    sys.exit(main())
