"""How does a person see it? The table of trials, the Markdown report and the winner's sweep file, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_ray.aspects import Aspect, aspects_of
from neo_ray.config import SweepConfig
from neo_ray.drafts import Guideline
from neo_ray.effects import AxisEffect
from neo_ray.evidence import Evidence, number, unit_of, with_unit
from neo_ray.hypotheses import Fitted
from neo_ray.law_text import law_lines, parted
from neo_ray.loading import dump, plain, validate
from neo_ray.matrix import Cell, Matrix
from neo_ray.pareto import front_lines, front_trials
from neo_ray.phase_text import confirmed_lines, how_line, phase_lines
from neo_ray.records import TrialRecord
from neo_ray.scores import called
from neo_ray.searching import BENCHMARKS
from neo_ray.space import build_space

if TYPE_CHECKING:
    from rich.console import Console

    from neo_ray.crosscheck import CrossCheck
    from neo_ray.upcoming import Upcoming

ORDER = ("COMPLETE", "RUNNING", "PRUNED", "FAILED")
MEASURED = {
    "CE": "select_ce",
    "bits/byte": "select_bits_per_byte",
    "KL": "select_kl",
    "report CE": "report_ce",
}
MEANINGS = {
    ("CE", "bits/byte"): "CE, bits/byte: held-out, on the select split",
    ("KL",): "KL: to the teacher, nats per token",
    ("report CE",): "report CE: on the split that no ranking touches, COMPLETE trials alone",
    ("peak GB",): "peak GB: memory of the largest worker (on a CPU of its process, trials before included)",
}
DISPENSABLE = ("peak GB", "report CE", "seconds", "bits/byte", "tokens")
"""Left out first where the terminal is too narrow for all columns."""
MAX_CURVES = 30


@dataclass(frozen=True)
class Analysis:
    """All that is computed from the records of one sweep."""

    folder: Path
    evidence: Evidence
    guidelines: tuple[Guideline, ...]
    matrix: Matrix | None
    notes: tuple[str, ...]
    """What was assumed, what happened to the trials that tell no effect, and what cannot be said."""
    effects: dict[str, AxisEffect | None] = field(default_factory=dict)
    """Axis → what it does to the metric; None where the trials do not tell."""
    name: str = ""
    """Of the trials, where neither a sweep file nor a folder names them."""
    found: Fitted = field(default_factory=Fitted)
    """Response surface, learning-rate law and rank trend, of those that the trials allow."""
    check: CrossCheck | None = None
    """Another fit beside the surface."""
    upcoming: tuple[Upcoming, ...] = ()
    """The sweep files of the trials that would decide what is open."""

    @property
    def best(self) -> TrialRecord | None:
        found = self.evidence.best
        return next(r for r in self.evidence.records if r.id == found.id) if found else None

    @cached_property
    def aspects(self) -> dict[str, Aspect]:
        """Sections beside the guidelines, by name."""
        return aspects_of(self.evidence)


def trials_table(
    records: Sequence[TrialRecord], metric: str = "select_ce", mode: str = "min", front: frozenset[str] = frozenset()
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names and one row of text a trial: COMPLETE ones best first, then running, pruned and failed ones.

    A parameter that is the same in all of several trials has no column. `front`: trials that are marked as on the Pareto front.
    """
    names = dict.fromkeys(name for record in records for name in record.params)
    shown = [n for n in names if len(records) == 1 or len({repr(r.params.get(n)) for r in records}) > 1]
    seeds = "seed" not in names and len({r.seed for r in records}) > 1
    ordered = ranked(records, metric, mode)
    several = len({r.phase for r in records}) > 1
    more = (*(("front",) if front else ()), *(("phase",) if several else ()))
    ours = any(name in record.metrics for record in records for name in MEASURED.values())
    measured = {name: key for name, key in MEASURED.items() if ours or not records}
    asked = [name for name in (metric, BENCHMARKS) if name == metric or any(name in r.metrics for r in records)]
    measured |= {called(name, records): name for name in asked if name not in MEASURED.values()}
    columns = ("trial", "state", *more, *shown, *(("seed",) if seeds else ()), *measured, "tokens", "seconds", "peak GB")
    marks = {r.id: {"front": "yes" if r.id in front else "", "phase": r.phase} for r in ordered}
    rows = [_trial_row(r, shown, seeds, tuple(marks[r.id][name] for name in more), measured.values()) for r in ordered]
    return columns, rows


def legend(columns: Sequence[str]) -> str:
    """What the columns of the table of trials mean, of those that there are."""
    return "; ".join(text for names, text in MEANINGS.items() if set(names) <= set(columns)) + "."


def ranked(records: Sequence[TrialRecord], metric: str, mode: str) -> list[TrialRecord]:
    """By state, then by metric; a missing value comes last."""

    def key(record: TrialRecord) -> tuple[int, bool, float]:
        value = record.metrics.get(metric)
        missing = value is None or value != value
        return ORDER.index(record.state), missing, 0.0 if missing else (value or 0.0) * (-1 if mode == "max" else 1)

    return sorted(records, key=key)


def render_table(columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """The table in the console's width; says which columns had no room."""
    from rich.table import Table
    from rich.text import Text

    kept, gap = _fitting(columns, rows, console.width)
    grid = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for index in kept:
        right = index > 1 and all(_is_number(row[index]) for row in rows)
        grid.add_column(Text(_header(columns[index])), justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(row[index]) for index in kept))
    console.print(grid)
    left_out = [columns[i] for i in range(len(columns)) if i not in kept]
    if left_out:
        console.print(f"no room for: {', '.join(left_out)} (all columns are in report.md)", style="dim", markup=False)


def best_lines(analysis: Analysis) -> list[str]:
    """The best setting in sentences; why there is none."""
    evidence, record, best = analysis.evidence, analysis.best, analysis.evidence.best
    if record is None or best is None:
        return [f"No COMPLETE trial has a value of {evidence.label}: there is no best setting, and no guideline."]
    setting = ", ".join(f"{name} {number(value, 3)}" for name, value in record.params.items()) or "the sweep's own values"
    seeds = f", the mean of {best.num_seeds} seeds" if best.num_seeds > 1 else ""
    lines = [f"Trial {best.id}: {setting}", f"{evidence.label} {with_unit(number(best.value), evidence.metric)}{seeds}"]
    known = {called(name, evidence.records): v for name, v in sorted(record.metrics.items()) if name != evidence.metric}
    others = [f"{name} {number(v)}" for name, v in known.items() if v is not None]
    lines += [", ".join(others)] if others else []
    if best.margin is not None:
        in_sds = f", {number(best.margin_in_sds, 2)} standard deviations of a run" if best.margin_in_sds is not None else ""
        lines.append(f"{number(best.margin, 3)} better than the second setting (trial {best.second}){in_sds}")
    for edge in best.edges:
        lines.append(f"{edge.axis} {number(edge.value, 3)} is at the {edge.side} end of the tested range")
    return lines


def noise_line(evidence: Evidence) -> str:
    found = evidence.noise
    if found is None:
        return f"Noise of a run in {evidence.label}: unknown, as no setting was completed with two seeds."
    return (
        f"Noise of a run in {evidence.label}: standard deviation {number(found.sd, 3)} (95 % interval {number(found.low, 3)} to "
        f"{number(found.high, 3)}), pooled over {found.num_settings} settings and {found.num_trials} runs."
    )


def evidence_line(guideline: Guideline) -> str:
    """The numbers behind a claim."""
    parts = []
    if guideline.effect is not None:
        parts.append(f"effect {number(guideline.effect, 3)} {guideline.unit}".rstrip())
    if guideline.interval is not None:
        parts.append("95 % {} to {}".format(*(number(end, 3) for end in guideline.interval)))
    if guideline.p_value is not None:
        parts.append(f"Holm p {number(guideline.p_value, 2)}")
    parts.append(f"{guideline.num_trials} trials, {guideline.num_seeds} seed{'s' if guideline.num_seeds != 1 else ''}")
    return ", ".join(parts)


def scope_lines(analysis: Analysis) -> list[str]:
    """What was swept, which is also how far the claims reach."""
    scope, evidence = analysis.evidence.scope, analysis.evidence
    sweep = evidence.sweep
    lines = [f"{axis}: {text}" for axis, text in scope.tested.items()]
    lines += [f"{name}: moves with {other}" for name, other in evidence.aliases.items()]
    named = {"teacher": scope.teacher, "student": scope.student, "data": scope.data, "alpha rule": scope.alpha_rule}
    lines += [f"{name}: {value}" for name, value in named.items() if value]
    if scope.student:
        lines.append("one pair of models: what is said holds for this pair only")
    if scope.tokens:
        lines.append("training tokens of a COMPLETE trial: {}".format(" to ".join(f"{n:,}" for n in sorted(set(scope.tokens)))))
    if sweep:
        lines.append(f"method: {sweep.method}; {how_line(sweep)}")
    direction = "higher" if evidence.mode == "max" else "lower"
    ranked_by = [evidence.label, unit_of(evidence.metric), f"{direction} is better"]
    return [*lines, f"ranked by: {', '.join(filter(None, ranked_by))}"]


def title_of(analysis: Analysis) -> str:
    evidence = analysis.evidence
    name = analysis.name or (evidence.sweep.name if evidence.sweep else analysis.folder.name)
    return f"{name}: what {len(evidence.records)} trials say"


def markdown(analysis: Analysis) -> str:
    """`report.md`. A section without data is not written."""
    evidence = analysis.evidence
    columns, rows = trials_table(evidence.records, evidence.metric, evidence.mode, front_trials(evidence))
    sections = [
        f"# {title_of(analysis)}",
        bullets(analysis.notes),
        "## What was swept\n\n" + bullets(scope_lines(analysis)),
        _section("Phases", phase_lines(evidence)),
        "## Best setting\n\n" + bullets(best_lines(analysis)),
        _section("Confirmed", confirmed_lines(evidence)),
        _section("Pareto front", front_lines(evidence)),
        _section("Laws", law_lines(evidence, analysis.found, analysis.check)),
        _guidelines_section(parted(analysis.guidelines)[0]),
        *(_section(aspect.title, aspect.lines) for aspect in analysis.aspects.values()),
        _section("Not tested", parted(analysis.guidelines)[1]),
        _section("What to run next", [line for sweep in analysis.upcoming for line in sweep.lines]),
        _matrix_section(evidence.label, analysis.matrix),
        _curves_section(evidence),
        _failures_section(evidence.records),
        "## Noise\n\n" + _escape(noise_line(evidence)),
        "## All trials\n\n" + _grid(columns, rows) + f"\n\n{legend(columns)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def best_yaml(sweep: SweepConfig, record: TrialRecord) -> str:
    """A sweep file of one trial, the winner: the sweep's models, data and resources with the trial's own config.

    Raises:
        ConfigError: the record's config or parameters do not fit the schema.
    """
    trial = record.config or {**plain(build_space(sweep).trial_config(record.params, sweep.trial)), "seed": record.seed}
    changed: dict[str, Any] = {
        "name": f"{sweep.name}-best",
        "search": {},
        "points": [],
        "phases": None,
        "sampler": {"name": "grid", "num_trials": 1},
        "scheduler": {"name": "none"},
    }
    config = validate({**plain(sweep), **trial, **changed})
    when = datetime.fromtimestamp(record.ended, UTC).strftime("%Y-%m-%d %H:%M UTC") if record.ended else "at an unknown time"
    metrics = ", ".join(f"{name} {number(value, 6)}" for name, value in sorted(record.metrics.items()))
    header = [f"The best setting of the sweep {sweep.name}: trial {record.id}, ended {when}.", metrics]
    return "".join(f"# {' '.join(line.split())}\n" for line in header) + "\n" + dump(config)


def _trial_row(
    record: TrialRecord, shown: Sequence[str], seeds: bool, more: tuple[str, ...], measured: Iterable[str]
) -> tuple[str, ...]:
    cause = f": {record.cause or 'unknown cause'}".replace("_", " ") if record.state == "FAILED" else ""
    return (
        record.id,
        record.state + cause,
        *more,
        *(number(record.params.get(name), 3) for name in shown),
        *((str(record.seed),) if seeds else ()),
        *(_metric(record.metrics.get(name)) for name in measured),
        _count(record.tokens),
        f"{record.seconds:.0f}",
        f"{record.peak_memory_bytes / 1e9:.1f}" if record.peak_memory_bytes else "–",
    )


def _metric(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4f}" if abs(value) < 1000 else number(value)


def _count(num: int) -> str:
    return str(num) if num < 10_000 else f"{num / 1e3:.0f}k" if num < 1_000_000 else f"{num / 1e6:.1f}M"


def _is_number(text: str) -> bool:
    return text == "–" or text[:1] in "-0123456789"


def _header(name: str) -> str:
    return name.replace("_", " ")


def _fitting(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> tuple[list[int], int]:
    """Indices of the columns that fit without breaking a word, and the gap between; state and headers wrap between words."""

    def needed(index: int) -> int:
        words = [*_header(columns[index]).split(), *(w for row in rows for w in (row[index].split() or [""]))]
        return max(map(len, words)) if index == 1 else max([*map(len, words), *(len(row[index]) for row in rows)])

    for dropped in ((), *(DISPENSABLE[: n + 1] for n in range(len(DISPENSABLE)))):
        kept = [i for i, name in enumerate(columns) if name not in dropped]
        room = width - sum(needed(i) for i in kept)
        if room >= len(kept) - 1:
            break
    return kept, 2 if room >= 2 * (len(kept) - 1) else 1


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + bullets(lines) if lines else ""


def _guidelines_section(guidelines: Sequence[Guideline]) -> str:
    if not guidelines:
        return ""
    blocks = ["## Guidelines"]
    for guideline in guidelines:
        ids = ", ".join(guideline.trials[:12]) + (f" and {len(guideline.trials) - 12} more" if len(guideline.trials) > 12 else "")
        lines = [f"asked: {guideline.hypothesis}", evidence_line(guideline), guideline.note, f"trials: {ids}" if ids else ""]
        blocks.append(f"**{guideline.verdict}** · {_escape(guideline.claim)}\n\n" + bullets([line for line in lines if line]))
    return "\n\n".join(blocks)


def _matrix_section(label: str, matrix: Matrix | None) -> str:
    if matrix is None or matrix.best is None:
        return ""
    header = [
        "rank",
        *(number(low, 3) if low == high else f"{number(low, 2)} … {number(high, 2)}" for low, high in matrix.learning_rates),
    ]
    rows = [
        [number(rank), *(_cell_text(cell, matrix.best == (i, j)) for j, cell in enumerate(matrix.cells[i]))]
        for i, rank in enumerate(matrix.ranks)
    ]
    text = (
        f"The best {label} of the COMPLETE trials at each rank (row) and learning rate (column), how many trials were "
        "there in all, and the best cell in bold. A dash: none was completed."
    )
    return f"## Rank × learning rate\n\n{text}\n\n" + _grid(header, rows, escape=False)


def _cell_text(cell: Cell, best: bool) -> str:
    if not cell.num_trials:
        return ""
    value = _metric(cell.best)
    lost = (f", {count} {how}" for count, how in ((cell.num_diverged, "diverged"), (cell.num_failed, "failed")) if count)
    return f"{f'**{value}**' if best else value} ({cell.num_trials}{''.join(lost)})"


def _curves_section(evidence: Evidence) -> str:
    records = [r for r in ranked(evidence.records, evidence.metric, evidence.mode) if r.curve]
    rungs = sorted({row["rung"] for r in records for row in r.curve if isinstance(row.get("rung"), int)})
    if not rungs:
        return ""
    rows = []
    for record in records[:MAX_CURVES]:
        values = {row.get("rung"): row.get(evidence.metric) for row in record.curve}
        rows.append([record.id, record.state, *(_metric(values.get(rung)) if rung in values else "" for rung in rungs)])
    header = ["trial", "state", *(f"rung {rung}{_rung_tokens(records, rung)}" for rung in rungs)]
    more = f" The best {MAX_CURVES} of {len(records)} trials." if len(records) > MAX_CURVES else ""
    return f"## Learning curves\n\n{evidence.label} at each rung.{more}\n\n" + _grid(header, rows)


def _rung_tokens(records: Sequence[TrialRecord], rung: int) -> str:
    tokens = [row["tokens"] for r in records for row in r.curve if row.get("rung") == rung and isinstance(row.get("tokens"), int)]
    return f", {_count(sorted(tokens)[len(tokens) // 2])} tokens" if tokens else ""


FAILURE_COLUMNS = ("cause", "what came of it", "times", "trials", "first error", "its log")


def failure_rows(records: Sequence[TrialRecord]) -> list[tuple[str, ...]]:
    """A row a cause, the most frequent first: of trials that FAILED, then of attempts that were lost."""
    failed = [(r.cause or "unknown", r, r.error) for r in records if r.state == "FAILED"]
    lost = [(attempt["cause"], r, attempt.get("message")) for r in records for attempt in r.lost_attempts]
    rows: list[tuple[str, ...]] = []
    for outcome, found in (("FAILED", failed), ("tried again", lost)):
        for cause, count in Counter(cause for cause, _, _ in found).most_common():
            those = [(record, error) for one, record, error in found if one == cause]
            first, error = next((pair for pair in those if pair[1]), those[0])
            which = list(dict.fromkeys(record.id for record, _ in those))
            said, log = " ".join((error or "").split())[:200], str(first.details.get("log", ""))
            rows.append((cause, outcome, str(count), ", ".join(which[:12]), said, log))
    return rows


def _failures_section(records: Sequence[TrialRecord]) -> str:
    rows = failure_rows(records)
    return "## Failures by cause\n\n" + _grid(FAILURE_COLUMNS, rows) if rows else ""


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], escape: bool = True) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) if escape else cell for cell in line) + " |" for line in lines)


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list of them."""
    return "\n".join(f"- {_escape(line)}" for line in lines)


def _escape(text: Any) -> str:
    """Text as Markdown shows it literally: what users and exceptions wrote is not markup."""
    return " ".join(str(text).split()).translate({ord(sign): f"\\{sign}" for sign in "\\`*<>|[]"})
