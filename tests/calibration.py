"""How often do the intervals hold what they promise? Synthetic sweeps with a known truth, analysed as any other.

`PYTHONPATH=.:tests python tests/calibration.py` runs 200 sweeps of each kind, writes docs/calibration.json and from it the table
in docs/statistics.md. A small version of it is a test.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from noise_study import noise_records, noise_study
from scipy import stats

from neo_ray.bench_summary import put_between
from neo_ray.effects import axis_effect
from neo_ray.evidence import Evidence, for_laws, gather
from neo_ray.guidelines import Guideline, guidelines_of
from neo_ray.hypotheses import best_ratio
from neo_ray.importances import importances_of
from neo_ray.intervals import percentiles
from neo_ray.laws import Law, learning_rate_law, surface_of
from neo_ray.records import TrialRecord, fold, write_atomically
from neo_ray.surface import RATE, RATIO, Surface
from neo_ray.trends import rank_trend

ROOT = Path(__file__).parent.parent
RANKS, RATES, RATIOS = (4, 8, 16, 32, 64), (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2), (0.0, 0.5, 1.0)
UNTRAINED = 6.0
Params = dict[str, Any]
Event = dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """A loss surface: a valley in ln learning rate whose floor falls with rank up to a saturation, and a valley in kd_ratio.

    lr*(rank, kd_ratio) = c · (rank / 16)^γ · exp(shift · (kd_ratio − ½)); `idle` does nothing.
    """

    c: float = 1e-3
    gamma: float = -0.3
    shift: float = 0.0
    """d ln lr* / d kd_ratio: the interaction."""
    depth: float = 0.03
    """How much a factor e from the best learning rate costs."""
    per_doubling: float = 0.03
    """What a doubling of the rank gains, up to the saturation rank."""
    saturation: float = 32.0
    best_ratio: float = 0.6
    ratio_depth: float = 0.2
    noise: float = 0.02
    alpha_rule: Callable[[int], float] = field(default=lambda rank: 2.0 * rank)

    def best_rate(self, rank: float, ratio: float) -> float:
        return self.c * (rank / 16) ** self.gamma * math.exp(self.shift * (ratio - 0.5))

    def loss(self, params: Params) -> float:
        rank, ratio = params["rank"], params["kd_ratio"]
        away = math.log(params["learning_rate"] / self.best_rate(rank, ratio))
        gain = self.per_doubling * math.log2(min(rank, self.saturation) / 16)
        return 4.6 + self.depth * away**2 - gain + self.ratio_depth * (ratio - self.best_ratio) ** 2


NOTHING = Truth(depth=0.0, per_doubling=0.0, ratio_depth=0.0)
CONSTANT_ALPHA = Truth(gamma=0.0, alpha_rule=lambda rank: 32.0)


def events(truth: Truth, seed: int, phases: tuple[str, ...] = ("noise", "map", "exploit"), pruning: float = 0.0) -> list[Event]:
    """The journal of a study. `pruning`: the share of the map that is stopped at the first evaluation, the worst there."""
    rng = np.random.default_rng(seed)
    settings = {"noise": _repeated(), "map": _grid(rng), "sobol": _sobol(seed)}
    written: list[Event] = []
    for phase in phases:
        chosen = _adaptive(written, rng, truth) if phase == "exploit" else _runs(settings[phase], rng, truth)
        share = pruning if phase == "map" else 0.5 * (phase == "exploit")
        written += _written(list(chosen), phase, len(written), share, truth.alpha_rule)
    return written


def records(truth: Truth, seed: int, **given: Any) -> list[TrialRecord]:
    return fold(events(truth, seed, **given))


def _grid(rng: np.random.Generator) -> list[tuple[Params, int]]:
    return [
        ({"rank": rank, "learning_rate": rate, "kd_ratio": ratio, "warmup_ratio": float(rng.choice([0.0, 0.05, 0.1]))}, 0)
        for rank in RANKS
        for rate in RATES
        for ratio in RATIOS
    ]


def _sobol(seed: int) -> list[tuple[Params, int]]:
    points = stats.qmc.Sobol(4, rng=np.random.default_rng(seed)).random(64)
    return [
        (
            {
                "rank": RANKS[min(4, int(5 * a))],
                "learning_rate": float(RATES[0] * (RATES[-1] / RATES[0]) ** b),
                "kd_ratio": float(c),
                "warmup_ratio": round(0.1 * float(d), 3),
            },
            0,
        )
        for a, b, c, d in points
    ]


def _repeated() -> list[tuple[Params, int]]:
    places = ((16, 1e-3, 0.5), (4, 3.16e-3, 0.0), (64, 3.16e-4, 1.0))
    shared = {"warmup_ratio": 0.05}
    return [({"rank": r, "learning_rate": lr, "kd_ratio": k, **shared}, s) for r, lr, k in places for s in (1, 2, 3)]


Run = tuple[Params, int, float, float]
"""Setting, seed, loss at the first evaluation, loss at the end."""


def _runs(settings: list[tuple[Params, int]], rng: np.random.Generator, truth: Truth) -> Iterator[Run]:
    for params, seed in settings:
        end = truth.loss(params) + truth.noise * rng.standard_normal()
        yield params, seed, end + 0.2 + truth.noise * rng.standard_normal(), end


def _adaptive(written: list[Event], rng: np.random.Generator, truth: Truth, num: int = 24) -> Iterator[Run]:
    """As TPE does it: new settings near those of the best quarter so far."""
    known = [(r.metrics["select_ce"], r.params) for r in fold(written) if r.state == "COMPLETE"]
    for _ in range(num):
        known.sort(key=lambda pair: pair[0] or 0.0)
        near = known[int(rng.integers(max(1, len(known) // 4)))][1]
        params = {
            "rank": int(rng.choice(RANKS)) if rng.random() < 0.3 else near["rank"],
            "learning_rate": float(np.clip(near["learning_rate"] * math.exp(0.4 * rng.standard_normal()), RATES[0], RATES[-1])),
            "kd_ratio": float(np.clip(near["kd_ratio"] + 0.15 * rng.standard_normal(), 0, 1)),
            "warmup_ratio": near["warmup_ratio"],
        }
        ((_, _, first, end),) = _runs([(params, 0)], rng, truth)
        known.append((end, params))
        yield params, 0, first, end


def _written(runs: list[Run], phase: str, start: int, pruning: float, alpha_rule: Callable[[int], float]) -> list[Event]:
    """The events of a phase's trials, in the form in which the journal holds them."""
    limit = np.quantile([first for *_, first, _ in runs], 1 - pruning) if pruning else math.inf
    found: list[Event] = []
    for number, (params, seed, first, end) in enumerate(runs):
        trial, pruned, alpha = f"{phase[0]}{start + number:04d}", first > limit, alpha_rule(params["rank"])
        config = {"lora": {"rank": params["rank"], "alpha": alpha}}
        shared = {"trial": trial, "time": 1.7e9 + start + number}
        begun = {"params": params, "config": config, "phase": "map" if phase == "sobol" else phase, "seed": seed}
        begun["scaling"] = alpha / params["rank"]
        found.append({"event": "start", **shared, **begun})
        for rung, value in ((1, first),) if pruned else ((1, first), (2, end)):
            row = {"rung": rung, "step": 10 * rung, "tokens": 1000 * rung, "seconds": 5.0 * rung, "select_ce": value}
            found.append({"event": "report", **shared, "row": row})
        state = "PRUNED" if pruned else "COMPLETE"
        found.append({"event": "end", **shared, "state": state, "metrics": {}, "details": {"baseline": {"select_ce": UNTRAINED}}})
    return found


@dataclass(frozen=True)
class Fitted:
    """What a synthetic study is said to show."""

    evidence: Evidence
    surface: Surface
    law: Law


def fitted(truth: Truth, seed: int, **given: Any) -> Fitted:
    evidence = gather(records(truth, seed, **given), None)
    surface = surface_of(evidence)
    assert surface is not None
    law = learning_rate_law(evidence, surface)
    assert law is not None
    return Fitted(evidence, surface, law)


Answers = dict[str, bool]
"""What was asked of one study, and whether it was right."""


def laws(truth: Truth, seed: int, **given: Any) -> Answers:
    """The intervals of the laws, of a study whose optimum lies inside."""
    found = fitted(truth, seed, **given)
    law, ratio = found.law, found.surface.coordinates[RATIO]
    rank, _, low, high = min(law.curve, key=lambda point: abs(math.log(point[0] / 16)), default=(16.0, 0.0, 0.0, 0.0))
    effect, error = _interaction(found.surface)
    spread, trend = found.evidence.noise, rank_trend(found.evidence, found.surface)
    dropped = any(text.startswith("ln scaling") for text in found.surface.dropped)
    return {
        "dropped": dropped and "ln scaling" in law.note,
        "γ": _in(law.gamma_interval, truth.gamma),
        "lr*": low <= truth.best_rate(rank, ratio.middle) <= high,
        "interaction": abs(effect - _true_interaction(truth, found.surface)) <= error,
        "saturation": trend is not None and _in(trend.saturation_interval, truth.saturation),
        "kd_ratio*": _in(percentiles(best_ratio(found.surface)[1]), truth.best_ratio),
        "noise": spread is not None and spread.low <= truth.noise <= spread.high,
    }


def _interaction(surface: Surface) -> tuple[float, float]:
    """How much more a high learning rate gains at a high kd_ratio, each one standard deviation off, and its half interval."""
    at = surface.terms.index(((RATE, 1), (RATIO, 1)))
    return 4 * float(surface.beta[at]), 4 * math.sqrt(surface.covariance[at, at]) * float(stats.t.isf(0.025, surface.df))


def _true_interaction(truth: Truth, surface: Surface) -> float:
    (slow, fast), (little, much) = (surface.coordinates[name].back(np.array([-1.0, 1.0])) for name in (RATE, RATIO))
    gains = {
        (lr, k): -truth.loss({"rank": 16, "learning_rate": lr, "kd_ratio": k}) for lr in (slow, fast) for k in (little, much)
    }
    return (gains[fast, much] - gains[slow, much]) - (gains[fast, little] - gains[slow, little])


def effects(truth: Truth, seed: int, **given: Any) -> Answers:
    """The intervals of the axes' effects: best against worst value, and where the best one is."""
    evidence = for_laws(gather(records(truth, seed, **given), None))
    done = [r for r in evidence.records if r.state == "COMPLETE"]
    answers: Answers = {}
    for axis in ("learning_rate", "kd_ratio", "warmup_ratio"):
        found = axis_effect(evidence.frame, axis, evidence.metric, evidence.mode, evidence.axes)
        assert found is not None
        best, worst = (
            sum(truth.loss({**r.params, axis: level.value}) for r in done) / len(done) for level in (found.best, found.worst)
        )
        answers[f"effect of {axis}"] = _in(found.interval, worst - best)
        if axis == "learning_rate":
            rates = np.geomspace(RATES[0], RATES[-1], 401)
            losses = [sum(truth.loss({**r.params, axis: float(rate)}) for r in done) for rate in rates]
            answers["best value"] = _in(found.best_interval, float(rates[int(np.argmin(losses))]))
    return answers


def silent(truth: Truth, seed: int, **given: Any) -> Answers:
    """Of noise alone: nothing is said of a direction. That settings are equal is none; that they are not equal is one."""
    return _silent(claims(truth, seed, **given))


def _silent(decided: Sequence[Guideline]) -> Answers:
    found = [g for g in decided if g.axis != "training"]
    return {"no claim": all(g.margin is not None and g.verdict == "supported" for g in found)}


def silent_arms(truth: Truth, seed: int) -> Answers:
    """The same of a study with methods, a second metric, and fresh seeds of the best and of the reference."""
    return _silent(_decided(gather(noise_records(truth.noise, seed), noise_study())))


def inert(truth: Truth, seed: int, **given: Any) -> Answers:
    """The importance of the axis that does nothing: no larger than those of its shuffled copies."""
    found = importances_of(gather(records(truth, seed, **given), None))
    assert found is not None and found.num_pruned
    (share,) = [share for share in found.shares if share.axis == "warmup_ratio"]
    return {"inert": not share.tells}


def claims(truth: Truth, seed: int, **given: Any) -> list[Guideline]:
    """The guidelines that a study supports or refutes."""
    return _decided(gather(records(truth, seed, **given), None))


def _decided(evidence: Evidence) -> list[Guideline]:
    return [g for g in guidelines_of(evidence) if g.verdict != "undecided"]


def extended(truth: Truth, seed: int, **given: Any) -> Answers:
    """Of an optimum beyond the range: it is said, and the law goes without it."""
    found = fitted(truth, seed, **given)
    said = [g for g in _decided(found.evidence) if g.axis == "learning_rate"]
    return {
        "extend": any("extend the range" in g.claim and g.verdict == "supported" for g in said),
        "censored": found.law.gamma is None,
    }


def _in(interval: tuple[float, float] | None, value: float) -> bool:
    return interval is not None and interval[0] <= value <= interval[1]


@dataclass(frozen=True)
class Study:
    """A kind of synthetic sweep, what is asked of it, and the share of right answers that is promised."""

    about: str
    ask: Callable[..., Answers]
    truth: Truth
    promised: float = 0.9
    given: dict[str, Any] = field(default_factory=dict)


ALL = ("noise", "map", "exploit")
STUDIES = {
    "grid": Study("grid of 75, lr* ∝ rank^−0.3, moves with kd_ratio", laws, Truth(shift=0.8), given={"phases": ALL}),
    "flat": Study("grid of 75, alpha 32, lr* the same at every rank", laws, CONSTANT_ALPHA, given={"phases": ALL}),
    "sobol": Study("64 Sobol points, lr* ∝ rank^−0.3", laws, Truth(), given={"phases": ("noise", "sobol")}),
    "effects": Study("grid of 75, lr* moves with kd_ratio", effects, Truth(shift=0.8), given={"phases": ALL}),
    "between": Study("grid of 75, lr* between two of its values", effects, Truth(c=1.8e-3), given={"phases": ALL}),
    "nothing": Study("grid of 75, noise alone", silent, NOTHING, 0.95, {"phases": ALL}),
    "pruned": Study("grid of 75, noise alone, half of it stopped early", silent, NOTHING, 0.95, {"pruning": 0.5}),
    "arms": Study("60 settings of 4 methods, noise alone, the best and the reference confirmed", silent_arms, NOTHING, 0.95),
    "inert": Study("grid of 75, two thirds of it stopped early", inert, Truth(shift=0.8), given={"pruning": 2 / 3}),
    "edge": Study("grid of 75, lr* three times beyond the range", extended, Truth(c=0.03, gamma=0.0), 0.95, {"phases": ALL}),
}


def measured(name: str, num: int, first: int = 0) -> dict[str, list[int]]:
    """Question → right answers, and studies."""
    study = STUDIES[name]
    counts: dict[str, list[int]] = {}
    for seed in range(first, first + num):
        for question, right in study.ask(study.truth, seed, **study.given).items():
            hits = counts.setdefault(question, [0, 0])
            hits[0], hits[1] = hits[0] + bool(right), hits[1] + 1
    return counts


BEGIN, END = "<!-- calibration: begin -->", "<!-- calibration: end -->"


def table(results: dict[str, dict[str, list[int]]]) -> str:
    """The results in Markdown, a line a question, with an exact 95 % interval of the share."""
    lines = ["| synthetic sweeps | asked | right | 95 % interval | promised |", "|---|---|---|---|---|"]
    for name, counts in results.items():
        for question, (hits, num) in counts.items():
            ends = stats.binomtest(hits, num).proportion_ci()
            span = f"{100 * ends.low:.1f} to {100 * ends.high:.1f} %"
            cells = (STUDIES[name].about, WORDS[question], f"{hits} of {num}", span, f"{STUDIES[name].promised:.0%}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


WORDS = {
    "dropped": "is ln scaling, which the alpha rule makes collinear, dropped and named?",
    "γ": "does the interval of γ hold it?",
    "lr*": "does the band of the law hold lr* at rank 16?",
    "interaction": "does the interval of learning rate × kd_ratio hold it?",
    "saturation": "does the interval of the saturation rank hold it?",
    "kd_ratio*": "does the interval of the best kd_ratio hold it?",
    "noise": "does the interval of a run's noise hold it?",
    "best value": "does the interval of the best learning rate hold it?",
    "effect of learning_rate": "does the interval of best against worst learning rate hold it?",
    "effect of kd_ratio": "does the interval of best against worst kd_ratio hold it?",
    "effect of warmup_ratio": "does the interval of an axis that does nothing hold 0?",
    "no claim": "is nothing said of a direction?",
    "inert": "does the share of an axis that does nothing stay within those of its shuffled copies?",
    "extend": "does it say to extend the range?",
    "censored": "is no law drawn through optima at the edge?",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(STUDIES)}; by default all")
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "calibration.json")
    asked = parser.parse_args()
    results = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    for name in asked.names or STUDIES:
        results[name] = measured(name, asked.num)
        print(name, results[name], flush=True)
        ordered = {known: results[known] for known in STUDIES if known in results}
        write_atomically(asked.out, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    put_between(asked.out.with_name("statistics.md"), BEGIN, END, table(ordered))
    return 0


if __name__ == "__main__":
    sys.exit(main())
