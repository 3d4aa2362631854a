"""How does a person read the laws? The surface, the learning-rate law, the rank trend and the cross-check, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neo_ray.drafts import Guideline
from neo_ray.evidence import Evidence, number, with_unit
from neo_ray.laws import Law
from neo_ray.surface import MIN_R2, Surface
from neo_ray.trends import Trend

if TYPE_CHECKING:
    from neo_ray.crosscheck import CrossCheck
    from neo_ray.hypotheses import Fitted


def law_lines(evidence: Evidence, found: Fitted, check: CrossCheck | None) -> list[str]:
    """Nothing where the settings are too few for a surface."""
    if found.surface is None:
        return []
    lines = [_surface_line(evidence, found.surface)]
    lines += _law_lines(found.law) if found.law else []
    lines += [_trend_line(evidence, found.trend)] if found.trend else []
    lines += [_check_line(evidence, check)] if check and found.surface.trusted else []
    return lines


def parted(guidelines: Sequence[Guideline]) -> tuple[list[Guideline], list[str]]:
    """The guidelines with trials behind them, and a line for each hypothesis that was not tested, with what would test it."""
    told = [g for g in guidelines if g.trials or g.place is None]
    lines = [
        f"{g.place}. {g.claim.partition(': ')[2]} ({g.claim.partition(':')[0]}; {g.note})" for g in guidelines if g not in told
    ]
    return told, sorted(lines, key=lambda line: int(line.partition(".")[0]))


def law_data(found: Fitted, check: CrossCheck | None) -> dict[str, Any]:
    """What guidelines.json has of them: those that there are."""
    surface, law, trend = found.surface, found.law, found.trend
    data: dict[str, Any] = {}
    if surface:
        data["surface"] = {
            "terms": [" × ".join(f"{name}^{power}" for name, power in term) or "1" for term in surface.terms],
            "num_settings": len(surface.gains),
            "num_outside": surface.num_outside,
            "r2": surface.r2,
            "dropped": surface.dropped,
        }
    if law:
        data["law"] = {
            name: getattr(law, name) for name in ("gamma", "gamma_interval", "c", "c_interval", "r2", "alpha_rule", "note")
        }
        data["law"]["optima"] = [{"rank": r, "learning_rate": rate, "censored": end} for r, (rate, end) in law.optima.items()]
    if trend:
        data["trend"] = {
            name: getattr(trend, name)
            for name in ("ranks", "gains", "isotonic", "saturation", "saturation_interval", "spearman", "kendall")
        }
    if check:
        data["cross_check"] = {name: getattr(check, name) for name in check.__dataclass_fields__}
    return data


def _surface_line(evidence: Evidence, surface: Surface) -> str:
    text = (
        f"Response surface of {evidence.label} over {len(surface.gains)} settings, {len(surface.terms)} terms: "
        f"leave-one-setting-out R² {number(surface.r2, 2)}"
    )
    text += "" if surface.trusted else f", and below {MIN_R2} it carries no guideline"
    if surface.num_outside:
        text += f"; without {surface.num_outside} COMPLETE trials of settings that diverged with a seed"
    return text + (f". Not in it: {'; '.join(surface.dropped)}" if surface.dropped else "")


def optima_text(law: Law) -> str:
    """`4: 3.5e-3, 16: 1.6e-3`: rank and its best learning rate."""
    ends = {"lowest": "≤ ", "highest": "≥ ", None: ""}
    best = ", ".join(f"{number(r)}: {ends[law.sides.get(r)]}{number(rate, 2)}" for r, (rate, _) in law.optima.items())
    return best + (" (≤, ≥: at the end of those tried)" if law.sides else "")


def _law_lines(law: Law) -> list[str]:
    lines = [f"Best learning rate of each rank: {optima_text(law)}"]
    if law.gamma is not None and law.gamma_interval and law.c_interval:
        (low, high), (least, most) = law.gamma_interval, law.c_interval
        rule = f", under the alpha rule: {law.alpha_rule}" if law.alpha_rule else ""
        lines.append(
            f"lr* = c × rank^γ with γ {number(law.gamma, 2)} (95 % {number(low, 2)} to {number(high, 2)}) and c "
            f"{number(law.c, 2)} ({number(least, 2)} to {number(most, 2)}){rule}"
        )
    elif law.note:
        lines.append(f"No law of the best learning rate: {law.note.partition(';')[0]}")
    return lines


def _trend_line(evidence: Evidence, trend: Trend) -> str:
    sign = 1 if evidence.mode == "max" else -1
    values = ", ".join(f"{number(r)}: {number(sign * gain)}" for r, gain in zip(trend.ranks, trend.gains, strict=True))
    return (
        f"{evidence.label} of each rank at its own best learning rate: {values}; rank {number(trend.saturation)} is the "
        f"smallest within one standard error of the best (95 %: {' to '.join(map(number, trend.saturation_interval))})"
    )


def _check_line(evidence: Evidence, check: CrossCheck) -> str:
    ours, theirs = (", ".join(f"{n} {number(v, 2)}" for n, v in where.items()) for where in (check.surface, check.process))
    where = "the same setting" if ours == theirs else theirs
    drawn = f", of {check.num_known}" if check.num_known > check.num_settings else ""
    text = f"The surface is best at {ours}; a Gaussian process on {check.num_settings} settings{drawn} at {where}"
    if not check.tells:
        return f"{text}; it is too unsure of either to say anything"
    if ours == theirs:
        return text
    apart = with_unit(number(check.apart, 2), evidence.metric)
    word = "no more" if check.agrees else "more"
    return f"{text}, where it expects {apart} more, {word} than two of its standard errors"
