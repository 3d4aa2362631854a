"""What does it cost? `python -m neo_ray.bench step` times optimizer steps, `… loss` the loss alone, `… sweep` whole sweeps,
`… reader` the rows of a store of targets beside a step that takes them, `… table` renders results.

Every result is a ratio between arms of one run. Exit code 2: a mistake, or a package that is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_ray import bench_summary

if TYPE_CHECKING:
    from neo_ray.bench_pairs import RandomPair
    from neo_ray.bench_turns import Measured
    from neo_ray.config import SweepConfig

SCHEMA_VERSION = 2
DESCRIPTION = "Time and memory as ratios between arms of one run; the scheme of the results: docs/benchmarks/README.md."
QUICKSTART = Path(__file__).resolve().parent.parent / "sweeps" / "quickstart.yaml"
PRESETS = ("quickstart", "llama-8b-1b")
LLAMA = PRESETS[1]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
"""What stands between them in a README is rendered from the JSON files beside it."""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    asked = _parser().parse_args(words)
    try:
        return _run(asked, words)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "neo_ray"):
            raise
        print(f"error: the package {package} is missing; `bench {asked.benchmark}` needs it", file=sys.stderr)
        return 2


def _run(asked: argparse.Namespace, words: list[str]) -> int:
    from neo_ray.settings import ConfigError

    try:
        if asked.benchmark == "table":
            update_readme(asked.folder)
            if asked.readme is not None:
                bench_summary.update(asked.readme, asked.folder)
            return 0
        _choose_device(asked.device)
        load = os.getloadavg()
        with contextlib.redirect_stdout(sys.stderr) if asked.json else contextlib.nullcontext():
            result = describe(asked.benchmark, MEASURES[asked.benchmark](asked), words, load)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_json(result) if asked.json else "\n" + markdown(result))
    if asked.out is not None:
        print(write(result, asked.out), file=sys.stderr if asked.json else sys.stdout)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m neo_ray.bench", description=DESCRIPTION)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    step = benchmarks.add_parser("step", help="one optimizer step: LoRA-SFT, Neo, and Neo as others step")
    loss = benchmarks.add_parser("loss", help="the loss alone, heads included")
    loss.add_argument("--preset", choices=PRESETS, default="quickstart", help="whose vocabulary and widths")
    loss.add_argument("--tokens", type=_count, nargs="+", default=[2048], metavar="N", help="scored positions (2048), or several")
    loss.add_argument("--vocabulary", type=_count, nargs="+", metavar="N", help="another than the preset's, or several")
    loss.add_argument("--width", type=_count, metavar="N", help="of the student's last hidden state")
    loss.add_argument("--teacher-width", type=_count, metavar="N", help="of the teacher's")
    sweep = benchmarks.add_parser("sweep", help="whole sweeps with a living teacher and with a store, end to end")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="of the quickstart's sweep, e.g. training.tokens=3000")
    sweep.add_argument("--trials", type=_count, default=8, metavar="N", help="of each sweep (8)")
    sweep.add_argument("--file", type=Path, default=QUICKSTART, help="another sweep file")
    reader = benchmarks.add_parser(
        "reader", help="rows of a store of targets, in shuffled batches, and a step that takes as many"
    )
    reader.add_argument("--place", metavar="PLACE", help="a new folder, or a URL such as s3://bucket/x")
    reader.add_argument("--rows", type=_count, default=9216, metavar="N", help="scored positions of the store (9216)")
    words = "models and sizes: the quickstart's, or random ones as Llama 3.1 8B and 3.2 1B, which need a GPU"
    for benchmark in (step, reader):
        benchmark.add_argument("--preset", choices=PRESETS, default="quickstart", help=words)
        benchmark.add_argument("--batch", type=_count, metavar="N", help="sequences of a step (4; llama-8b-1b: 1)")
        benchmark.add_argument("--length", type=_count, metavar="N", help="tokens of a sequence (256; llama-8b-1b: 2048)")
        benchmark.add_argument("--teacher", metavar="MODEL", help="folder or hub name; the quickstart's by default")
        benchmark.add_argument("--student", metavar="MODEL", help="folder or hub name; the quickstart's cut of its teacher")
        benchmark.add_argument("--data", metavar="SOURCE", help="text; the quickstart's by default")
        benchmark.add_argument("--tiny", action="store_true", help="random models of a few layers: seconds, to see it run")
    for benchmark, repeats in ((step, 15), (loss, 15), (sweep, 1), (reader, 15)):
        benchmark.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        words = f"measured rounds of all arms ({repeats})"
        benchmark.add_argument("--repeats", type=_count, default=repeats, metavar="N", help=words)
        benchmark.add_argument(
            "--out", type=Path, metavar="PATH", help="a .json file, or a folder: <benchmark>-<device>.json there"
        )
        benchmark.add_argument("--json", action="store_true", help="the result on stdout, and nothing else there")
    table = benchmarks.add_parser("table", help="render a folder's JSON files into its README.md")
    table.add_argument("folder", type=Path)
    table.add_argument("--readme", type=Path, metavar="PATH", help="also the short table of this page")
    return parser


def _stepping(asked: argparse.Namespace) -> tuple[SweepConfig | RandomPair, int, int]:
    """Models, sequences of a step, tokens of a sequence."""
    from neo_ray.settings import ConfigError

    is_llama, given = asked.preset == LLAMA, (asked.teacher, asked.student, asked.data)
    if is_llama and (asked.tiny or any(given)):
        raise ConfigError(f"--preset: {LLAMA} has its own random models; allowed beside it: --batch, --length, --repeats")
    batch, length = asked.batch or (1 if is_llama else 4), asked.length or (2048 if is_llama else 256)
    from neo_ray import bench_pairs

    random = bench_pairs.LLAMA if is_llama else bench_pairs.TINY
    return random if is_llama or asked.tiny else pair(*given, length), batch, length


def _step(asked: argparse.Namespace) -> list[Measured]:
    from neo_ray.bench_step import measure_steps

    return [measure_steps(*_stepping(asked), asked.repeats, print)]


def _loss(asked: argparse.Namespace) -> list[Measured]:
    from neo_ray.bench_loss import measure_losses
    from neo_ray.shapes import KNOWN_SHAPES

    is_llama = asked.preset == LLAMA
    teacher, student = (KNOWN_SHAPES[name] for name in (("llama-3.1-8b", "llama-3.2-1b") if is_llama else ("smollm2-135m",) * 2))
    width = asked.width or student.hidden_size
    teacher_width = asked.teacher_width or (asked.width or teacher.hidden_size)
    vocabularies = asked.vocabulary or [student.vocab_size]
    sizes = [(tokens, vocabulary) for vocabulary in vocabularies for tokens in asked.tokens]
    return measure_losses(sizes, width, teacher_width, asked.repeats, print)


def _sweep(asked: argparse.Namespace) -> list[Measured]:
    from neo_ray.bench_sweep import measure_sweeps

    return [measure_sweeps(asked.file, asked.overrides, asked.trials, asked.repeats, print)]


def _reader(asked: argparse.Namespace) -> list[Measured]:
    from neo_ray.bench_reader import measure_reader

    return [measure_reader(*_stepping(asked), asked.rows, asked.place, asked.repeats, print)]


Measure = Callable[[argparse.Namespace], "list[Measured]"]
MEASURES: dict[str, Measure] = {"step": _step, "loss": _loss, "sweep": _sweep, "reader": _reader}


def pair(teacher: str | None, student: str | None, data: str | None, length: int) -> SweepConfig:
    """The quickstart's models and text, or others in their place.

    Raises:
        ConfigError: the quickstart's file cannot be read.
    """
    from neo_ray import loading

    given = [f"data.max_length={length}", "data.train_limit=null", *([f"data.source={json.dumps(data)}"] if data else [])]
    models = (("teacher", teacher), ("student", student))
    given += [f"{side}={json.dumps({'model': model})}" for side, model in models if model]
    return loading.load(QUICKSTART, given)


def describe(benchmark: str, measured: list[Measured], words: list[str], load: tuple[float, float, float]) -> dict[str, Any]:
    """The result as plain data: what `docs/benchmarks/README.md` documents."""
    import torch

    from neo_ray import devices
    from neo_ray.bench_turns import summary
    from neo_ray.environment import environment

    def case(one: Measured) -> dict[str, Any]:
        arms = summary(one.samples, one.baseline)
        return {"setting": one.setting, "arms": {name: one.known[name] | arm for name, arm in arms.items()}}

    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "device": devices.describe(devices.local_device()),
        "command": shlex.join(["python", "-m", "neo_ray.bench", *words]),
        "baseline": measured[0].baseline,
        "cases": [case(one) for one in measured],
        "threads": torch.get_num_threads(),
        "load_average": {"before": load, "after": os.getloadavg()},
        "environment": environment(),
    }


def write(result: dict[str, Any], path: Path) -> Path:
    """Write a result to a `.json` file, or under its own name into a folder."""
    from neo_ray.records import write_atomically

    target = path if path.suffix == ".json" else path / f"{result['benchmark']}-{_slug(result['device'])}.json"
    write_atomically(target, as_json(result) + "\n")
    return target


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1, ensure_ascii=False)


def update_readme(folder: Path) -> None:
    """Put the tables of the folder's JSON files between the two marks of its README.md.

    Raises:
        ConfigError: there is no README.md with both marks.
    """
    bench_summary.put_between(folder / "README.md", BEGIN, END, rendered(folder))


def rendered(folder: Path) -> str:
    """The tables of all JSON files in a folder, by file name."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return "".join(f"\n{markdown(result)}\n" for result in results)


def markdown(result: dict[str, Any]) -> str:
    """One result as a heading, a line of conditions and, for each case, its setting and a table that reads well on a terminal."""
    paragraphs = [f"### {result['benchmark']}, {result['device']}", _conditions(result)]
    for case in result["cases"]:
        paragraphs += [_setting(case), _table(case["arms"]), _ceiling(case["arms"])]
    return "\n\n".join(filter(None, paragraphs))


def _table(arms: dict[str, Any]) -> str:
    columns = {name: cell for name, cell in COLUMNS.items() if any(cell(*item) for item in arms.items())}
    rows = [list(columns), *([cell(*item) for cell in columns.values()] for item in arms.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def _ceiling(arms: dict[str, Any]) -> str:
    """What no store of targets can exceed, beside what the best one came to."""
    counted = arms.get("neo", {}).get("counted_ratio")
    stored = {name: arm for name, arm in arms.items() if name != "neo" and name.startswith("neo_")}
    if counted is None or not stored:
        return ""
    best = min(stored, key=lambda name: stored[name]["time_ratio"]["value"])
    gain = arms["neo"]["time_ratio"]["value"] / stored[best]["time_ratio"]["value"]
    large = bench_summary.ceiling_of_a_large_pair()
    return (
        f"Counted, a live teacher's step costs {counted:.2f} × that without a teacher (for 8B → 1B {large:.2f} ×): the most that "
        f"a store can spare. Measured, it costs {gain:.2f} × that of `{best}`."
    )


def _setting(case: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in case["setting"].items())


def _conditions(result: dict[str, Any]) -> str:
    before, after = (result["load_average"][when][0] for when in ("before", "after"))
    run = {
        "rounds": len(result["cases"][0]["arms"][result["baseline"]]["seconds"]),
        "threads": result["threads"],
        "torch": result["environment"]["packages"]["torch"],
        "load before": f"{before:.1f}",
        "after": f"{after:.1f}",
    }
    facts = ", ".join(f"{name} {value}" for name, value in run.items())
    return f"{facts}; {result['environment']['time'][:10]}: `{result['command']}`"


def _seconds(_: str, arm: dict[str, Any]) -> str:
    return "{:#.3g} [{:#.3g}, {:#.3g}]".format(arm["median_seconds"], *arm["quartiles_seconds"])


def _number(key: str, digits: int, unit: float = 1) -> Cell:
    return lambda _, arm: "" if arm.get(key) is None else f"{arm[key] / unit:.{digits}f}"


Cell = Callable[[str, dict[str, Any]], str]
COLUMNS: dict[str, Cell] = {
    "arm": lambda name, _: name,
    "what": lambda _, arm: arm["about"],
    "time ratio [95 %]": lambda _, arm: bench_summary.ratio_text(arm),
    "counted": _number("counted_ratio", 2),
    "tokens/s": _number("tokens_per_second", 0),
    "teacher tokens": _number("teacher_tokens", 0),
    "trials' s": _number("trial_seconds", 1),
    "filling s": _number("filling_seconds", 1),
    "seconds [quartiles]": _seconds,
    "held MB": _number("held_bytes", 0, 1e6),
    "peak above MB": _number("median_extra_bytes", 0, 1e6),
    "peak ratio": _number("memory_ratio", 2),
}
"""Heading → cell of an arm; a column without any value is left out."""


def _choose_device(wanted: str) -> None:
    """Before torch looks for a GPU."""
    from neo_ray.settings import ConfigError

    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from neo_ray import devices

    if wanted == "cuda" and devices.local_device().type != "cuda":
        raise ConfigError("--device cuda: torch finds no GPU here; allowed: auto, cpu")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
