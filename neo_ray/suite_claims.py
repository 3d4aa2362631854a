"""What do the items of a suite decide? Models against each other on the same items: far sharper than two averages.

Two models answer most items alike; only the items on which they differ tell them apart (`paired.compare`). What such a claim
holds for is these two models: another seed of a setting would be another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from neo_ray.drafts import Draft
from neo_ray.evidence import Evidence
from neo_ray.paired import Difference, compare
from neo_ray.records import TrialRecord
from neo_ray.scores import STUDENT, SuiteScores
from neo_ray.searching import BENCHMARKS, of_suite

METHODS = (("neo", "lora"), ("kd", "sft"), ("neo", "kd"))
"""With a teacher against without one, and an adapter against all parameters, all else alike."""
VARIANTS = (("moslora", "lora"),)
"""Figure 4 of LLM-Neo (arXiv 2411.06839), within each method that trains an adapter."""


def item_claims(evidence: Evidence, scores: Mapping[str, SuiteScores]) -> Iterator[Draft]:
    """The best trial against the untrained student, the best of each method and of each variant against that of its counterpart.

    Where trials were chosen by benchmarks, p and interval are corrected for the number of settings: the best of them was lucky on
    the very items that it is judged by.

    Args:
        scores: of trials by id, and of the untrained student.
    """
    best = evidence.best
    if best is None:
        return
    tries = best.num_settings if of_suite(evidence.metric) else 1
    if best.id in scores and STUDENT in scores:
        yield _claim(
            "training", (f"trial {best.id}", "the untrained student"), (best.id,), scores[best.id], scores[STUDENT], tries
        )
    arms = [("method", [(f"method {method}", {"method": method}) for method in pair]) for pair in METHODS]
    arms += [
        ("variant", [(f"{method} with {variant}", {"method": method, "variant": variant}) for variant in pair])
        for pair in VARIANTS
        for method in ("neo", "lora")
    ]
    for axis, (first, second) in arms:
        ours, theirs = (_leader(evidence, arm, scores) for _, arm in (first, second))
        if ours is not None and theirs is not None:
            names = (f"{first[0]} (trial {ours.id})", f"{second[0]} (trial {theirs.id})")
            yield _claim(axis, names, (ours.id, theirs.id), scores[ours.id], scores[theirs.id], tries)


def _claim(
    axis: str, names: tuple[str, str], trials: tuple[str, ...], ours: SuiteScores, theirs: SuiteScores, tries: int
) -> Draft:
    found = compare(ours.items, theirs.items, level=1 - 0.05 / tries)
    (first, second), suite = names, ours.suite if ours.limit is None else f"{ours.suite}, first {ours.limit} items of a task,"
    reached = f"{100 * ours.average:.1f} % against {100 * theirs.average:.1f} %, {_items(found, ours)}"
    return Draft(
        axis,
        f"{first} answers more of {suite} rightly than {second}",
        {
            "supported": f"On {suite} {first} is better than {second}: {reached}",
            "refuted": f"On {suite} {first} is worse than {second}: {reached}",
            "undecided": f"Whether {first} is better than {second} on {suite} is open: {reached}",
        },
        BENCHMARKS,
        found.value,
        (found.low, found.high),
        min(1.0, tries * found.p),
        trials=trials,
        num_seeds=1,
        notes=[
            "item by item; it holds for these two models, and other seeds of their settings are others",
            *([f"corrected for the choice among {tries} settings by these items"] if tries > 1 else []),
        ],
    )


def _items(found: Difference, scores: SuiteScores) -> str:
    total = sum(map(len, scores.items.values()))
    return f"better on {found.better} and worse on {found.worse} of {total:,} items"


def _leader(evidence: Evidence, arm: Mapping[str, str], scores: Mapping[str, SuiteScores]) -> TrialRecord | None:
    """The best COMPLETE trial of an arm that was asked."""
    sign = -1 if evidence.mode == "max" else 1
    found: Sequence[tuple[float, TrialRecord]] = [
        (sign * value, record)
        for record in evidence.records
        if record.id in scores
        and arm.items() <= _arm(record).items()
        and record.state == "COMPLETE"
        and (value := record.measured(evidence.metric)) is not None
    ]
    return min(found, key=lambda pair: (pair[0], pair[1].id))[1] if found else None


def _arm(record: TrialRecord) -> dict[str, str]:
    config = record.config
    return {"method": config.get("method", "neo"), "variant": (config.get("lora") or {}).get("variant", "lora")}
