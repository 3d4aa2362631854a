"""Which trials can there be? The axes of a sweep, checked against the trial config, and every way to walk them.

An axis has a value in a trial where its `when` holds: an axis that it names is active there and has one of the values. Where
an axis is inactive, its leaf keeps the value of the sweep file, and that is what an axis derived from it sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from neo_ray.axes import SpaceAxis, as_leaf, check_axis, leaf_value, number_type, short_name, show
from neo_ray.config import SweepConfig
from neo_ray.loading import plain
from neo_ray.mistakes import explain, guess
from neo_ray.records import TrialRecord
from neo_ray.settings import ConfigError, TrialConfig, trial_leaves

DEFAULT_TRIALS = 16
LENGTHS = ("epochs", "tokens", "steps")
IDENTITY = (
    "teacher",
    "student",
    "data",
    "method",
    "lora",
    "distill",
    "training",
    "deepspeed",
    "evaluation",
    "seed",
    "search",
    "objective",
)


class _Asking:
    """Looks like an Optuna trial and remembers the distribution that it was asked for."""

    def __init__(self) -> None:
        self.asked: Any = None

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        from optuna.distributions import CategoricalDistribution

        self.asked = CategoricalDistribution(choices)
        return choices[0]

    def suggest_int(self, name: str, low: int, high: int, step: int = 1) -> int:
        from optuna.distributions import IntDistribution

        self.asked = IntDistribution(low, high, step=step)
        return low

    def suggest_float(self, name: str, low: float, high: float, step: float | None = None, log: bool = False) -> float:
        from optuna.distributions import FloatDistribution

        self.asked = FloatDistribution(low, high, step=step, log=log)
        return low


@dataclass(frozen=True)
class Space:
    """The search space of a sweep. `axes` stand in the order of evaluation: each after those that it depends on."""

    axes: dict[str, SpaceAxis]
    base: dict[str, Any]
    """Leaf → its value in the sweep file, for what is no axis or inactive."""

    @property
    def searched(self) -> tuple[str, ...]:
        """The axes that vary by themselves: sampled ones with more than one value."""
        return tuple(
            name
            for name, axis in self.axes.items()
            if axis.sampled and self.possible(axis) and (axis.low < axis.high if axis.continuous else axis.num_options > 1)
        )

    def active(self, axis: SpaceAxis, params: dict[str, Any]) -> bool:
        """Does the axis exist in a trial with these params?"""
        seen = {name: params.get(name) if name in self.axes else self.base[name] for name in axis.when}
        return all(seen[name] in allowed for name, allowed in axis.when.items())

    def possible(self, axis: SpaceAxis) -> bool:
        """Can the axis exist in any trial? Not where its `when` names a leaf that is no axis and has another value."""
        return all(
            self.possible(self.axes[name]) if name in self.axes else self.base[name] in allowed
            for name, allowed in axis.when.items()
        )

    def define(self, trial: Any) -> dict[str, Any]:
        """One setting, define-by-run: axis → value of every active axis, asking `trial` for the sampled ones."""
        params: dict[str, Any] = {}
        for name, axis in self.axes.items():
            if self.active(axis, params):
                params[name] = axis.suggest(trial) if axis.sampled else self._computed(axis, params)
        return params

    def grid(self) -> list[dict[str, Any]]:
        """Every setting once, the first axis slowest. Raises ConfigError where an axis is continuous."""
        self.require_finite("the grid")
        return list(self._settings(list(self.axes.values())))

    def size(self) -> int | None:
        """How many settings there are; None where an axis is continuous."""
        if any(axis.continuous for axis in self.axes.values()):
            return None
        # Only axes that others depend on decide which axes are active; the rest multiply, and need no walk.
        deciding: set[str] = set()
        for axis in reversed(self.axes.values()):
            if axis.name in deciding or any(axis.name in other.when for other in self.axes.values()):
                deciding |= {axis.name, *axis.depends_on}
        rest, total = [a for a in self.axes.values() if a.name not in deciding and a.sampled], 0
        for params in self._settings([a for a in self.axes.values() if a.name in deciding]):
            count = 1
            for axis in rest:
                count *= axis.num_options if self.active(axis, params) else 1
            total += count
        return total

    def reach(self, name: str) -> list[Any]:
        """What a leaf can be in this space: all its values, or the ends of a long range. Ignores which go together."""
        axis = self.axes.get(name)
        if axis is None:
            return [self.base[name]]
        if axis.kind == "of" and axis.of:
            values = [axis.derive(source) for source in self.reach(axis.of)]
        elif axis.continuous:
            values = [axis.as_leaf(axis.low), axis.as_leaf(axis.high)]
        elif axis.num_options > 1000:
            values = [axis.option(0), axis.option(1), axis.option(axis.num_options - 1)]
        else:
            values = list(axis.options())
        return [*values, self.base[name]] if axis.when and self.base[name] is not None else values

    def distributions(self, params: dict[str, Any]) -> dict[str, Any]:
        """The Optuna distribution of each sampled axis that is active under these params: what `define` asked for."""
        asked = {}
        for axis in self._sampled(params):
            trial = _Asking()
            axis.suggest(trial)
            asked[axis.name] = trial.asked
        return asked

    def optuna_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """The values that go with `distributions(params)`. Raises ConfigError for a value outside its axis."""
        return {axis.name: axis.optuna_value(params[axis.name]) for axis in self._sampled(params)}

    def trial_config(self, params: dict[str, Any], base: TrialConfig) -> TrialConfig:
        """The trial that these params mean, on top of `base`. A length (epochs, tokens, steps) replaces that of `base`.

        Raises:
            ConfigError: a name that is no leaf, or a value that the schema refuses.
        """
        raw, leaves = plain(base), trial_leaves()
        if any(name in params for name in LENGTHS):
            raw["training"].update(dict.fromkeys(LENGTHS))
        for name, value in params.items():
            section, _, leaf = leaves[short_name(name, "params")].rpartition(".")
            (raw[section] if section else raw)[leaf] = value
        try:
            return TrialConfig.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(explain(error, TrialConfig)) from None

    def describe(self) -> list[str]:
        """One line an axis."""
        width = max(map(len, self.axes), default=0)
        return [f"{name:<{width}}  {axis.text}" for name, axis in self.axes.items()]

    def require_finite(self, who: str) -> None:
        for axis in self.axes.values():
            if axis.continuous:
                raise ConfigError(
                    f"search.{axis.key}: {who} needs finite axes, and `{axis.kind}` has endless values; "
                    "use grid or quantised, or another sampler.name (tpe, random, qmc)"
                )

    def _computed(self, axis: SpaceAxis, params: dict[str, Any]) -> Any:
        return axis.derive(params.get(axis.of, self.base[axis.of])) if axis.of else axis.values[0]

    def _settings(self, axes: list[SpaceAxis]) -> Iterator[dict[str, Any]]:
        rows: Iterator[dict[str, Any]] = iter([{}])
        for axis in axes:
            rows = self._with_axis(axis, rows)
        return rows

    def _with_axis(self, axis: SpaceAxis, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            if not self.active(axis, row):
                yield row
            elif axis.sampled:
                yield from ({**row, axis.name: value} for value in axis.options())
            else:
                yield {**row, axis.name: self._computed(axis, row)}

    def _sampled(self, params: dict[str, Any]) -> list[SpaceAxis]:
        axes = [a for a in self.axes.values() if a.sampled and self.active(a, params)]
        missing = [a.name for a in axes if a.name not in params]
        if missing:
            raise ConfigError(f"params: {', '.join(missing)} is missing (an axis of this space)")
        return axes


def build_space(config: SweepConfig) -> Space:
    """The space that a sweep file describes.

    Raises:
        ConfigError: unknown or repeated axis, a value that the leaf's schema refuses, a cycle, a grid over a continuous axis,
            a method that needs a teacher where there is none.
    """
    axes: dict[str, SpaceAxis] = {}
    for key, raw in config.search.items():
        axis = check_axis(key, raw)
        if axis.name in axes:
            raise ConfigError(f"search.{key}: the same axis as search.{axes[axis.name].key}")
        axes[axis.name] = axis
    trial = config.trial
    base = {leaf: leaf_value(trial, path) for leaf, path in trial_leaves().items()}
    space = Space(_in_order(axes), base)
    space = Space({name: _with_condition(axis, space) for name, axis in space.axes.items()}, base)
    for axis in space.axes.values():
        if axis.of:
            _check_derived(axis, space)
    _check_sweep(config, space)
    return space


def trials_planned(config: SweepConfig, space: Space) -> int:
    """How many trials the sweep runs (without those that are put back after a failure)."""
    wanted = config.sampler.num_trials
    if config.sampler.name == "grid":
        total = (space.size() or 0) * max(1, len(config.sampler.seeds))
        return min(total, wanted) if wanted else total
    return wanted or (DEFAULT_TRIALS if space.searched else 1)


def grid_settings(config: SweepConfig, space: Space) -> list[tuple[dict[str, Any], int]]:
    """The (params, seed) of a grid sweep in order: all settings with the first seed, then with the next."""
    seeds = config.sampler.seeds or (config.seed,)
    settings = [(params, params.get("seed", seed)) for seed in seeds for params in space.grid()]
    return settings[: config.sampler.num_trials]


Setting = tuple[str, dict[str, Any], int]
"""Trial id, params, seed."""


def settings_to_run(config: SweepConfig, space: Space, records: list[TrialRecord]) -> tuple[list[Setting], int]:
    """Settings that are given rather than proposed (interrupted trials first, then a grid's rest), and how many trials remain."""
    planned = trials_planned(config, space)
    interrupted = [(r.id, r.params, r.seed) for r in records if not r.finished]
    if config.sampler.name != "grid":
        return interrupted, max(len(interrupted), planned - sum(r.finished for r in records))
    known = {_key(r.params, r.seed) for r in records}
    fresh = [(p, s) for p, s in grid_settings(config, space)[:planned] if _key(p, s) not in known]
    numbered = [(trial_id(len(records) + i), p, s) for i, (p, s) in enumerate(fresh)]
    return interrupted + numbered, len(interrupted) + len(numbered)


def trial_id(number: int) -> str:
    return f"{number:04d}"


def _key(params: dict[str, Any], seed: int) -> str:
    return repr((sorted(params.items(), key=lambda item: item[0]), seed))


def identity(config: SweepConfig) -> dict[str, Any]:
    """What determines the meaning of a sweep's trials. Name, sampler, scheduler, resources and storage may change."""
    data = {name: plain(config)[name] for name in IDENTITY}
    return {**data, "search": {name: axis.text for name, axis in build_space(config).axes.items()}}


def differences(old: SweepConfig, new: SweepConfig) -> list[str]:
    """What keeps `new` from continuing `old`: lines of `path: old → new`; none where their trials mean the same."""
    before, after = _flat(identity(old)), _flat(identity(new))
    return [
        f"{path}: {show(before.get(path, '(nothing)'))} → {show(after.get(path, '(nothing)'))}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]


def _in_order(axes: dict[str, SpaceAxis]) -> dict[str, SpaceAxis]:
    """The axes in the file's order, each after those that it depends on."""
    ordered: dict[str, SpaceAxis] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise ConfigError(f"search.{axes[name].key}: depends on itself ({' → '.join((*trail, name))})")
        if name in axes and name not in ordered:
            for other in axes[name].depends_on:
                visit(other, (*trail, name))
            ordered[name] = axes[name]

    for name in axes:
        visit(name, ())
    return ordered


def _with_condition(axis: SpaceAxis, space: Space) -> SpaceAxis:
    """The axis with the values of its `when` typed like the leaves that they are compared with."""
    when = {}
    for name, wanted in axis.when.items():
        where, other = f"search.{axis.key}.when.{name}", space.axes.get(name)
        values = tuple(as_leaf(trial_leaves()[name], value, where) for value in wanted)
        if not values:
            raise ConfigError(f"{where}: is empty")
        if other is not None and other.continuous:
            raise ConfigError(f"{where}: compares for equality, and {name} is continuous ({other.kind})")
        options = list(other.options()) if other is not None and other.kind != "of" and other.num_options <= 1000 else values
        if not any(value in options for value in values):
            known = ", ".join(map(show, options))
            raise ConfigError(f"{where}: {show(values[0])} is never taken{guess(values[0], options)}; {name} is one of {known}")
        when[name] = values
    return replace(axis, when=when)


def _check_derived(axis: SpaceAxis, space: Space) -> None:
    where, source = f"search.{axis.key}", str(axis.of)
    if number_type(trial_leaves()[source]) is None:
        raise ConfigError(f"{where}.of: {source} is not a number")
    if source not in space.axes and space.base[source] is None:
        raise ConfigError(f"{where}.of: {source} has no value; give it one, or make it an axis")
    root = space.axes.get(source)
    while root is not None and root.of:
        root = space.axes.get(root.of)
    if axis.whole and root is not None and root.continuous:
        raise ConfigError(f"{where}: {axis.name} is a whole number, and {root.name}, which it derives from, is continuous")
    for value in space.reach(axis.name):
        as_leaf(axis.path, value, f"{where}: {axis.formula}")


def _check_sweep(config: SweepConfig, space: Space) -> None:
    lengths = [name for name in LENGTHS if name in space.axes and not space.axes[name].when]
    if len(lengths) > 1:
        raise ConfigError(f"search.{lengths[0]}: a trial has one length, and {' and '.join(lengths)} are axes")
    if config.sampler.name == "grid":
        space.require_finite("a grid sweep")
    if "seed" in space.axes and config.sampler.seeds:
        raise ConfigError("sampler.seeds: `seed` is an axis already; give one of the two")
    if len(set(config.sampler.seeds)) < len(config.sampler.seeds):
        raise ConfigError(f"sampler.seeds: a seed stands twice (got {list(config.sampler.seeds)})")
    taught = [m for m in space.reach("method") if m in ("kd", "neo")]
    if taught and config.teacher is None:
        where = "search.method" if "method" in space.axes else "method"
        raise ConfigError(f"{where}: {' and '.join(taught)} needs a `teacher` section (without one: lora, sft)")


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {path: data}
    rows: dict[str, Any] = {}
    for key, value in data.items():
        rows.update(_flat(value, f"{path}.{key}" if path else str(key)))
    return rows
