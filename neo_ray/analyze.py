"""What did a sweep find? `python -m neo_ray.analyze results/<name>`: from the records alone, also while the sweep runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_ray import door, uploads
from neo_ray.config import SweepConfig
from neo_ray.loading import load
from neo_ray.records import Journal, TrialRecord, load_records, write_atomically, write_records
from neo_ray.settings import ConfigError
from neo_ray.storage import at
from neo_ray.supply import BIAS

if TYPE_CHECKING:
    from rich.console import Console

    from neo_ray.evidence import Evidence
    from neo_ray.report import Analysis

SCHEMA_VERSION = 1
WIDTH_OF_A_LOG = 120
"""Columns where the output is no terminal, which has no width of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse results folders or tables of trials, print the findings, write the files. Exit code 2 where there is no record."""
    parser = argparse.ArgumentParser(
        prog="python -m neo_ray.analyze",
        description="Guidelines and report from a sweep's records, or from somebody else's table of trials.",
        epilog="exit codes: 0 written, also where nothing can be concluded; 2 no trials to read, a mistake in the command, or "
        "files that cannot be written; 130 interrupted",
    )
    parser.add_argument(
        "path",
        nargs="+",
        help="results folders (results/<name>) or their URLs, a trials.jsonl, a CSV or JSONL of trials, an Optuna database "
        "(sqlite:///…), a Ray Tune experiment folder",
    )
    parser.add_argument("--out", type=Path, help="where to write; by default the results folder, or <name>-report beside a table")
    parser.add_argument("--figures", action="store_true", help="also write the figures as PNG and SVG, into figures/")
    parser.add_argument("--param", action="append", default=[], metavar="NAME=COLUMN", help="of a table: a parameter's column")
    parser.add_argument("--metric", metavar="COLUMN", help="of a table: what is ranked by")
    parser.add_argument("--mode", choices=("min", "max"), default="min", help="of a table: which is better (default: min)")
    parser.add_argument("--group", metavar="COLUMN", help="of a table: rows that differ in it are analysed apart")
    asked = parser.parse_args(argv)
    with door.end() as end:
        _run(asked)
    return end.code


def _run(asked: argparse.Namespace) -> None:
    from rich.console import Console

    from neo_ray.screen import show, show_files

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_LOG)
    try:
        found = [(path, *pair) for path in asked.path for pair in _analyses(path, asked)]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for path, analysis, place in found:
        show(analysis, console)
        written = _written(analysis, place, asked.figures)
        if asked.out is None and not analysis.name:
            uploads.publish(at(path), *(str(file.relative_to(place)) for file in written))
        show_files(written, place, console)
    if len(found) > 1:
        analyses = [analysis for _, analysis, _ in found]
        verdicts = side_by_side(analyses)
        _section(console, "Side by side", verdicts)
        _pool(analyses, verdicts, _common_place(asked), console)


def _analyses(path: str, asked: argparse.Namespace) -> list[tuple[Analysis, Path]]:
    """The analyses of one place, and where each is written: below `--out` in a folder of its own where there are several."""
    from neo_ray.foreign import Columns, is_foreign, place_of, read

    params = dict(_param(text) for text in asked.param)
    columns = Columns(params, asked.metric, asked.mode, asked.group)
    if not is_foreign(path, columns):
        analysis = analyse(uploads.local_copy(path))
        several = len(asked.path) > 1
        out = asked.out / analysis.folder.name if asked.out and several else asked.out
        return [(analysis, out or analysis.folder)]
    groups = read(path, columns)
    out = asked.out or place_of(path)
    several = len(groups) > 1 or len(asked.path) > 1
    return [
        (_analysis(group.records, None, Path(path), group.notes, (group.metric, group.mode), group.name), place)
        for group in groups
        if (place := out / group.folder if several else out)
    ]


def _param(text: str) -> tuple[str, str]:
    name, _, column = text.partition("=")
    return name, column or name


def _written(analysis: Analysis, place: Path, figures: bool) -> list[Path]:
    written = write(analysis, place)
    if figures:
        from neo_ray.page import charts_of
        from neo_ray.printing import write_figures

        written += write_figures(charts_of(analysis)[0].values(), place / "figures")
    return written


def _common_place(asked: argparse.Namespace) -> Path:
    """Of what is said of several analyses together: `--out`, else with the groups of one table, else `results/` here."""
    from neo_ray.foreign import place_of

    return asked.out or (Path("results") if len(asked.path) > 1 else place_of(asked.path[0]))


def _pool(analyses: Sequence[Analysis], verdicts: Sequence[str], place: Path, console: Console) -> None:
    """Effects over several analyses, on the screen and as `pooled.md` and `pooled.json`."""
    from neo_ray.pooling import pooled, pooled_lines, pooled_markdown
    from neo_ray.screen import show_files

    found = pooled(analyses)
    lines = pooled_lines(analyses, found)
    _section(console, "Pooled over studies", lines)
    data = {"lines": lines, "pooled": [asdict(each) for each in found]}
    texts = {"pooled.md": pooled_markdown(lines, verdicts), "pooled.json": _dumped(data)}
    for name, text in texts.items():
        write_atomically(place / name, text)
    show_files([place / name for name in texts], place, console)


def side_by_side(analyses: Sequence[Analysis]) -> list[str]:
    """A line a question that several groups of trials were asked, with the verdict in each."""
    asked: dict[str, list[str]] = {}
    for analysis in analyses:
        for guideline in analysis.guidelines:
            name = analysis.name or analysis.folder.name
            asked.setdefault(guideline.hypothesis, []).append(f"{name} {guideline.verdict}")
    return [f"{hypothesis}: {', '.join(verdicts)}" for hypothesis, verdicts in asked.items() if len(verdicts) > 1]


def analyse(path: str | Path) -> Analysis:
    """Everything the records of a results folder (or one `trials.jsonl`) say.

    Raises:
        ValueError: there is no record.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    records, unread = _records(path)
    sweep, notes = _sweep(folder)
    analysis = _analysis(records, sweep, folder, [*notes, *unread])
    return replace(analysis, notes=(*analysis.notes, *_teacher(folder, records)))


def _analysis(
    records: Sequence[TrialRecord],
    sweep: SweepConfig | None,
    folder: Path,
    notes: Sequence[str],
    objective: tuple[str, str] = ("select_ce", "min"),
    name: str = "",
) -> Analysis:
    from neo_ray.crosscheck import cross_check
    from neo_ray.effects import effects_of
    from neo_ray.evidence import for_laws, gather
    from neo_ray.guidelines import guidelines_of
    from neo_ray.hypotheses import fitted
    from neo_ray.matrix import rank_by_learning_rate
    from neo_ray.report import Analysis
    from neo_ray.scores import of_results
    from neo_ray.upcoming import upcoming

    evidence = replace(gather(records, sweep, objective), scores=of_results(folder, records) if folder.is_dir() else {})
    laws = for_laws(evidence)
    effects, found = effects_of(laws.frame, laws.axes, laws.metric, laws.mode), fitted(evidence)
    guidelines = tuple(guidelines_of(evidence, effects, found))
    return Analysis(
        folder=folder,
        evidence=evidence,
        guidelines=guidelines,
        matrix=rank_by_learning_rate(laws.frame, evidence.metric, evidence.mode),
        notes=(*notes, *_notes(evidence)),
        effects=effects,
        name=name,
        found=found,
        check=cross_check(found.surface) if found.surface is not None and found.surface.trusted else None,
        upcoming=upcoming(evidence, guidelines, found),
    )


def write(analysis: Analysis, folder: str | Path) -> list[Path]:
    """Write `trials.jsonl`, `guidelines.json`, `report.md`, `report.html`; with a sweep file `best.yaml` and `next.yaml`, too.

    What has no room in `next.yaml` is in `next-2.yaml`, and so on; those of an analysis before go.
    `trials.jsonl` is left alone where it is what the records were read from.
    """
    from neo_ray.page import page
    from neo_ray.report import best_yaml, markdown

    folder = Path(folder).expanduser()
    records, sweep, best = list(analysis.evidence.records), analysis.evidence.sweep, analysis.best
    texts = {"guidelines.json": guidelines_json(analysis), "report.md": markdown(analysis), "report.html": page(analysis)}
    if sweep is not None and best is not None:
        try:
            texts["best.yaml"] = best_yaml(sweep, best)
        except ConfigError as error:
            texts["report.md"] += f"\nbest.yaml was not written: the config of trial {best.id} is not valid: {error}\n"
    texts |= {each.file: each.text for each in analysis.upcoming}
    elsewhere = folder.resolve() != analysis.folder.resolve()
    if elsewhere or any(True for _ in Journal(folder).events()):
        write_records(folder, records)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    _remove_answered(folder, texts)
    return [path for name in ("trials.jsonl", *texts) if (path := folder / name).exists()]


def _remove_answered(folder: Path, written: Collection[str]) -> None:
    """Sweep files of an analysis before, whose questions are decided or stand in another file."""
    for path in folder.glob("next*.yaml"):
        if path.name not in written and path.read_text(encoding="utf-8").startswith(f"# {path.name}:\n"):
            path.unlink()


def guidelines_json(analysis: Analysis) -> str:
    """`guidelines.json`, as guidelines.schema.json documents it. What is not known is null; a NaN is never written."""
    from neo_ray.confirmed import confirmed
    from neo_ray.law_text import law_data
    from neo_ray.pareto import front_of

    evidence, best = analysis.evidence, analysis.best
    several = evidence.sweep.objective if evidence.sweep and evidence.sweep.objective.further else None
    fresh = confirmed(evidence.records, evidence.sweep, evidence.metric, evidence.mode)
    data = {
        "schema_version": SCHEMA_VERSION,
        "generated_from": {
            "folder": str(analysis.folder),
            "sweep": evidence.sweep.name if evidence.sweep else None,
            "metric": evidence.metric,
            "mode": evidence.mode,
            "trials": _states(evidence.records),
        },
        "noise": asdict(evidence.noise) if evidence.noise else None,
        "best": {**asdict(evidence.best), "params": best.params} if evidence.best and best else None,
        **({"confirmed": asdict(fresh)} if fresh else {}),
        **({"front": [asdict(member) for member in front_of(evidence.records, several)[0]]} if several else {}),
        "aspects": {aspect.name: asdict(aspect.found) for aspect in analysis.aspects.values()},
        **law_data(analysis.found, analysis.check),
        "notes": analysis.notes,
        "guidelines": [asdict(guideline) for guideline in analysis.guidelines],
    }
    return _dumped(data)


def _section(console: Console, title: str, lines: Sequence[str]) -> None:
    from rich.text import Text

    if lines:
        console.print(Text(f"\n{title}", style="bold"))
    for line in lines:
        console.print(Text(line))


def _records(path: Path) -> tuple[list[TrialRecord], list[str]]:
    """The records, and how much of the file is none."""
    unread: list[Any] = []
    try:
        records = load_records(path, unread)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: an event of the journal is not one of neo_ray's ({type(error).__name__}: {error})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    lines = f"{len(unread)} line{'s' if len(unread) > 1 else ''}"
    torn = "a line that is being written, or that a crash tore, is such a one"
    return records, [f"{lines} of the records could not be read, and tell nothing ({torn})."] if unread else []


def _sweep(folder: Path) -> tuple[SweepConfig | None, list[str]]:
    """The resolved sweep file, and what is assumed without one."""
    assumed = "ranked by select_ce, lower is better; the axes are the parameters that vary; no best.yaml"
    path = folder / "sweep.yaml"
    if not path.exists():
        return None, [f"There is no sweep.yaml here. Assumed: {assumed}."]
    try:
        return load(path), []
    except ConfigError as error:
        raise ValueError(
            f"{path}: cannot be used ({error}); to go by the records alone give its trials.jsonl elsewhere"
        ) from None


def _states(records: Sequence[TrialRecord]) -> dict[str, int]:
    from neo_ray.report import ORDER

    return {state: count for state in ORDER if (count := sum(r.state == state for r in records))}


def _notes(evidence: Evidence) -> list[str]:
    """How many trials are in which state, what diverged, and which axes nothing can be said of."""
    from neo_ray.evidence import constant_axes, number
    from neo_ray.startup import lost_attempts_line, startup_line, stops_line

    states = _states(evidence.records)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    lost = any(record.state == "FAILED" and record.cause == "diverged" for record in evidence.records)
    whose = "the COMPLETE ones and those that diverged" if lost else "the COMPLETE ones alone"
    notes = [f"{len(evidence.records)} trials: {counts}. Effects come from {whose}."]
    if "RUNNING" in states:
        notes.append("The sweep is not finished: all of this may change.")
    diverged = evidence.frame[evidence.frame["diverged"].astype(bool)]
    if len(diverged):
        notes.append(_divergence(evidence, len(diverged)))
    bucketed = sum(record.details.get("targets") == "topk" for record in evidence.records)
    if bucketed:
        notes.append(f"{bucketed} trials had targets.mode topk, which is biased: {BIAS}.")
    notes += filter(None, (line(evidence.records) for line in (lost_attempts_line, startup_line, stops_line)))
    constant = constant_axes(evidence).items()
    return [*notes, *(f"{name} is {number(value)} in every trial: nothing can be said of it." for name, value in constant)]


def _teacher(folder: Path, records: Sequence[TrialRecord]) -> list[str]:
    """What the teacher read, where that was counted."""
    from neo_ray.account import account, account_line

    line = account_line(account(Journal(folder).events(), records))
    return [line] if line else []


def _divergence(evidence: Evidence, count: int) -> str:
    from neo_ray.evidence import number

    text = f"{count} trial{'s' if count > 1 else ''} diverged (NaN, or worse than the untrained student)"
    frame = evidence.frame
    if "learning_rate" not in evidence.axes:
        return f"{text}."
    diverged = frame["diverged"].astype(bool)
    rates, fine = frame["learning_rate"][diverged].dropna(), frame["learning_rate"][~diverged].dropna()
    if rates.empty:
        return f"{text}."
    highest = f"; the highest learning rate of those that did not: {number(fine.max())}" if len(fine) else ""
    return f"{text}, at learning rates {number(rates.min())} to {number(rates.max())}{highest}."


def _dumped(data: dict[str, Any]) -> str:
    return json.dumps(_json(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _json(value: Any) -> Any:
    """JSON types: NumPy scalars as numbers, what is not finite as null."""
    if isinstance(value, dict):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value - value != 0:
        return None
    return value


if __name__ == "__main__":
    sys.exit(main())
