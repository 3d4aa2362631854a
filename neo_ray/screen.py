"""What stands on the screen? The findings on 40 lines, also of 80 columns: what was decided first. report.md has the rest."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from neo_ray.drafts import Guideline
from neo_ray.law_text import law_lines, parted
from neo_ray.pareto import front_lines, front_trials
from neo_ray.phase_text import confirmed_lines, phase_lines
from neo_ray.report import Analysis, best_lines, evidence_line, legend, noise_line, render_table, title_of, trials_table

LINES = 40
"""Of the whole output, the names of the files included. 80 columns are what terminals open with, 40 lines half of a laptop's
screen."""
FOR_FILES = 4
LEAST_ROWS = 3
"""Fewer trials are no table."""
STYLES = {"supported": "green", "refuted": "red", "undecided": "yellow"}


@dataclass(frozen=True)
class Item:
    """One finding. Those of a lower `place` are shown first where there is no room for all."""

    section: str
    place: int
    text: str
    most: int = 2
    """Lines; what is longer ends in an ellipsis."""
    word: str = ""
    """A verdict before it."""
    of: Item | None = None
    """The claim that these are the numbers of: they are not shown without it."""

    def lines(self, width: int) -> list[Text]:
        text, indent = f"{self.word}  {self.text}" if self.word else self.text, "  " if self.of else ""
        found = textwrap.wrap(text, width, max_lines=self.most, placeholder=" …", initial_indent=indent)
        lines = [Text(line, "dim" if self.of else "") for line in found]
        if self.word:
            lines[0].stylize(STYLES[self.word], 0, len(self.word))
        return lines


def show(analysis: Analysis, console: Console) -> None:
    """The findings on a console: table, best setting, guidelines, notes."""
    left = LINES - FOR_FILES - 1
    items, width = list(_items(analysis)), max(20, console.width - 2)
    shown: dict[Item, list[Text]] = {}
    for item in sorted(items, key=lambda item: item.place):
        titled = bool(item.section) and item.section not in {each.section for each in shown}
        most = min(item.most, left - titled) if item.word == "undecided" else item.most
        lines = replace(item, most=most).lines(width) if most > 0 else []
        if lines and len(lines) + titled <= left and (item.of is None or item.of in shown):
            shown[item] = lines
            left -= len(lines) + titled
    _show_table(analysis, console, left)
    section = ""
    for item in (item for item in items if item in shown):
        if item.section != section:
            console.print(Text(item.section, "bold"))
        section = item.section
        for line in shown[item]:
            console.print(Padding(line, (0, 0, 0, 2 if section else 0), expand=False))
    more = len(items) - len(shown)
    console.print(Text(f"{more} more findings are in report.md." if more else "report.md has the numbers.", "dim"))


def show_files(files: Sequence[Path], place: Path, console: Console) -> None:
    """Where the report is: its folder, and the names in it; of a folder of figures their number."""
    names = [str(file.relative_to(place)) for file in files if file.parent == place]
    figures = len(files) - len(names)
    names += [f"figures/ ({figures} files)"] if figures else []
    console.print(f"{place}: {', '.join(names)}", markup=False)


def _items(analysis: Analysis) -> Iterator[Item]:
    """All findings, in the order of the screen."""
    evidence = analysis.evidence
    yield Item("", 0, title_of(analysis), 1)
    for title, place, lines in (
        ("Phases", 8, phase_lines(evidence)),
        ("Best setting", 1, best_lines(analysis)[:2]),
        ("Best setting", 7, best_lines(analysis)[2:]),
        ("Confirmed", 2, confirmed_lines(evidence)),
        ("Pareto front", 4, front_lines(evidence)),
    ):
        yield from (Item(title, place, line) for line in lines)
    yield from _guidelines(analysis.guidelines)
    yield from (Item("Laws", 5, line) for line in law_lines(evidence, analysis.found, analysis.check))
    for aspect in analysis.aspects.values():
        yield from (Item(aspect.title, 5 + min(index, 1), line) for index, line in enumerate(aspect.brief))
    yield from (Item("What to run next", 4, sweep.lines[0]) for sweep in analysis.upcoming)
    first, *others = analysis.notes
    yield Item("Notes", 1, first)
    yield from (Item("Notes", 5, line) for line in others)
    yield Item("Notes", 6, noise_line(evidence))


def _guidelines(guidelines: Sequence[Guideline]) -> Iterator[Item]:
    """What stands with its numbers; what is open, and what was not tested, in a paragraph each."""
    told, untested = parted(guidelines)
    for guideline in (g for g in told if g.verdict != "undecided"):
        claim = Item("Guidelines", 2, guideline.claim, 2, guideline.verdict)
        yield claim
        if guideline.effect is not None:
            yield Item("Guidelines", 3, evidence_line(guideline), 1, of=claim)
    still_open = "; ".join(g.hypothesis for g in told if g.verdict == "undecided")
    if still_open:
        yield Item("Guidelines", 2, still_open, 6, "undecided")
    names = "; ".join(line.partition(" (")[0] for line in untested)
    if names:
        yield Item("Not tested", 4, names, 4)


def _show_table(analysis: Analysis, console: Console, room: int) -> None:
    """As many of the best trials as there is room for, with what the columns mean."""
    evidence = analysis.evidence
    columns, rows = trials_table(evidence.records, evidence.metric, evidence.mode, front_trials(evidence))
    for count in range(min(len(rows), room), min(LEAST_ROWS, len(rows)) - 1, -1):
        of_all = f"{len(rows) - count} more trials are in report.md. " if count < len(rows) else ""
        beneath = Text(f"{of_all}{legend(columns)}", "dim")
        with console.capture() as captured:
            render_table(columns, rows[:count], console)
            console.print(beneath)
        if captured.get().count("\n") <= room:
            render_table(columns, rows[:count], console)
            console.print(beneath)
            return
