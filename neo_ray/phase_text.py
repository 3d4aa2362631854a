"""How does a person read the phases of a study? Their trials, what chose them, and what was confirmed, in sentences."""

from __future__ import annotations

from typing import Any

from neo_ray.config import SweepConfig
from neo_ray.confirmed import confirmed, phase_counts, samplers_of
from neo_ray.evidence import Evidence, for_laws, number, with_unit
from neo_ray.scores import called


def how_line(sweep: SweepConfig) -> str:
    """What chose the settings of a sweep."""
    if sweep.phases is None:
        return f"sampler: {sweep.sampler.name}; scheduler: {sweep.scheduler.name}"
    return f"phases with a sampler: {', '.join(f'{name} ({sampler})' for name, sampler in samplers_of(sweep).items())}"


def phase_lines(evidence: Evidence) -> list[str]:
    """How many trials each phase has, and which of them laws are fitted on; nothing where there is one phase."""
    counts = phase_counts(evidence.records)
    lines = [f"{name}: {sum(c.values())} trials ({', '.join(f'{n} {s}' for s, n in c.items())})" for name, c in counts.items()]
    laws = {record.phase for record in for_laws(evidence).records}
    used, chosen = ([name for name in counts if (name in laws) == wanted] for wanted in (True, False))
    if chosen:
        lines.append(f"effects of axes come from {' and '.join(used)}; scores chose the settings of {' and '.join(chosen)}")
    return lines


def confirmed_lines(evidence: Evidence) -> list[str]:
    """What fresh seeds say of the best settings; nothing where none were run."""
    found = confirmed(evidence.records, evidence.sweep, evidence.metric, evidence.mode)
    if found is None:
        return []
    setting = _setting_text(found.params)
    seeds = f"{len(found.seeds)} fresh seeds ({', '.join(map(str, found.seeds))})"
    label = called(found.metric, evidence.records)
    value = with_unit(number(found.value), found.metric)
    lines = [
        f"Of {found.num_settings} settings that ran again with {seeds}, the best is {setting}"
        f"{', the reference itself' if found.is_reference else ''}: {label} {value} on average"
    ]
    if found.gain is not None and found.interval is not None:
        low, high = (number(end, 3) for end in found.interval)
        settled = "does not settle it" if found.interval[0] <= 0 <= found.interval[1] else "settles it"
        gain = with_unit(number(found.gain, 3), found.metric)
        lines.append(
            f"Its gain over the reference ({label} {number(found.reference)}) is {gain}, seed by "
            f"seed; the 95 % interval {low} to {high}, corrected for the choice among {found.num_settings - 1}, {settled}"
        )
    if found.metric == evidence.metric:
        lines.append(f"{label} has no report split: it judges by the items that it chose by, and only the seeds are fresh")
    if found.left_out:
        others = "; ".join(f"{_setting_text(params)} (has {len(seeds)})" for params, seeds in found.left_out)
        lines.append(f"Not among them, as it diverged or is not COMPLETE with all {len(found.seeds)} of these seeds: {others}")
    return lines


def _setting_text(params: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number(value, 3)}" for name, value in params.items())
