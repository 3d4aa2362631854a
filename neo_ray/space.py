"""Which trials can there be? The axes of a sweep, checked against the trial config, and every way to walk them.

An axis has a value in a trial where its `when` holds: what it names has one of the values there. Where no axis gives a leaf a
value, it keeps that of the sweep file, and that is what an axis derived from it sees. Several axes may set one leaf (a learning
rate for each method) where their conditions exclude each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from neo_ray import points, refusals
from neo_ray.axes import SpaceAxis, as_leaf, check_axis, leaf_value, number_type, short_name, show
from neo_ray.config import SweepConfig
from neo_ray.loading import plain
from neo_ray.mistakes import explain, guess
from neo_ray.settings import ConfigError, TrialConfig, trial_leaves

LENGTHS = ("epochs", "tokens", "steps")


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
    beyond: tuple[dict[str, Any], ...] = ()
    """Settings that run whether or not they are in the space: the reference of a confirm phase."""

    @property
    def searched(self) -> tuple[str, ...]:
        """The axes that vary by themselves: sampled ones with more than one value."""
        return tuple(
            name
            for name, axis in self.axes.items()
            if axis.sampled and self.possible(axis) and (axis.low < axis.high if axis.continuous else axis.num_options > 1)
        )

    def setters(self, name: str) -> list[SpaceAxis]:
        """The axes behind a name: all that set the leaf of that name, else the axis of that name."""
        if name in self.base:
            return [axis for axis in self.axes.values() if axis.leaf == name]
        return [self.axes[name]] if name in self.axes else []

    def seen(self, name: str, params: dict[str, Any]) -> Any:
        """What an axis or a leaf is in a trial: the value of an active axis, else the sweep file's (an axis's own name: None)."""
        return next((params[axis.name] for axis in self.setters(name) if axis.name in params), self.base.get(name))

    def active(self, axis: SpaceAxis, params: dict[str, Any]) -> bool:
        """Does the axis exist in a trial with these params?"""
        return all(self._holds(name, allowed, params) for name, allowed in axis.when.items())

    def _holds(self, name: str, allowed: tuple[Any, ...], params: dict[str, Any]) -> bool:
        setters = self.setters(name)
        if not setters:
            return self.base[name] in allowed
        return any(params[axis.name] in allowed for axis in setters if axis.name in params)

    def possible(self, axis: SpaceAxis) -> bool:
        """Can the axis exist in any trial? Not where its `when` names a leaf that is no axis and has another value."""
        return all(
            any(self.possible(setter) for setter in self.setters(name)) if self.setters(name) else self.base[name] in allowed
            for name, allowed in axis.when.items()
        )

    def seed(self, params: dict[str, Any], otherwise: int) -> int:
        """The trial's seed: that of an axis, else the given one."""
        return self.seen("seed", params) if self.setters("seed") else otherwise

    def define(self, trial: Any) -> dict[str, Any]:
        """One setting, define-by-run: axis → value of every active axis, asking `trial` for the sampled ones."""
        return self.setting(lambda axis: axis.suggest(trial))

    def setting(self, value_of: Callable[[SpaceAxis], Any]) -> dict[str, Any]:
        """Axis → value of every active axis, asking `value_of` for each that has a choice."""
        params: dict[str, Any] = {}
        for name, axis in self.axes.items():
            if self.active(axis, params):
                params[name] = value_of(axis) if axis.sampled else self._computed(axis, params)
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
            named = {other.name for o in self.axes.values() for name in o.when for other in self.setters(name)}
            if axis.name in deciding | named:
                deciding |= {axis.name, *(other.name for name in axis.depends_on for other in self.setters(name))}
        rest, total = [a for a in self.axes.values() if a.name not in deciding and a.sampled], 0
        for params in self._settings([a for a in self.axes.values() if a.name in deciding]):
            count = 1
            for axis in rest:
                count *= axis.num_options if self.active(axis, params) else 1
            total += count
        return total

    def combinations(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """Every way in which trials can have these leaves: the settings of their axes, and of those that these depend on."""
        wanted: set[str] = set(names)
        for axis in reversed(self.axes.values()):
            if axis.leaf in wanted or axis.name in wanted:
                wanted |= {axis.name, *(other.name for name in axis.depends_on for other in self.setters(name))}
        return list(self._settings([axis for axis in self.axes.values() if axis.name in wanted]))

    def reach(self, name: str) -> list[Any]:
        """What a leaf or an axis can be: all its values, or the ends of a long range. Ignores which go together."""
        setters, base = self.setters(name), self.base.get(name)
        values = [value for axis in setters for value in self._reach(axis)]
        if not setters or (base is not None and all(axis.when for axis in setters)):
            values.append(base)
        values += [params[axis.name] for params in self.beyond for axis in setters if axis.name in params]
        return list({repr(value): value for value in values}.values())

    def _reach(self, axis: SpaceAxis) -> list[Any]:
        if axis.kind == "of" and axis.of:
            return [axis.derive(source) for source in self.reach(axis.of)]
        if axis.continuous:
            return [axis.as_leaf(axis.low), axis.as_leaf(axis.high)]
        if axis.num_options > 1000:
            return [axis.option(0), axis.option(1), axis.option(axis.num_options - 1)]
        return list(axis.options())

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
        values = {self.axes[n].leaf if n in self.axes else short_name(n, "params"): value for n, value in params.items()}
        if any(name in values for name in LENGTHS):
            raw["training"].update(dict.fromkeys(LENGTHS))
        for name, value in values.items():
            section, _, leaf = leaves[name].rpartition(".")
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
                    "use grid or quantised, or another sampler.name (tpe, gp, cmaes, nsga2, random, qmc)"
                )

    def _computed(self, axis: SpaceAxis, params: dict[str, Any]) -> Any:
        return axis.derive(self.seen(axis.of, params)) if axis.of else axis.values[0]

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
            two axes that may set one leaf in the same trial, a method that needs a teacher where there is none.
    """
    axes: dict[str, SpaceAxis] = {}
    for key, raw in config.search.items():
        axis = check_axis(key, raw)
        if axis.name in axes:
            raise ConfigError(f"search.{key}: the same axis as search.{axes[axis.name].key}")
        axes[axis.name] = axis
    trial = config.trial
    base = {leaf: leaf_value(trial, path) for leaf, path in trial_leaves().items()}
    axes = {name: _with_names(axis, axes) for name, axis in axes.items()}
    space = Space(_in_order(Space(axes, base)), base)
    space = Space({name: _with_condition(axis, space) for name, axis in space.axes.items()}, base)
    for axis in space.axes.values():
        if axis.of:
            _check_derived(axis, space)
    _check_disjoint(space)
    reference = points.reference_setting(config, space)
    space = replace(space, beyond=(reference,) if reference else ())
    _check_sweep(config, space)
    return space


def _with_names(axis: SpaceAxis, axes: dict[str, SpaceAxis]) -> SpaceAxis:
    """The axis with what it refers to by the names that the space knows: axes, and short names of leaves."""

    def known(name: str, where: str) -> str:
        return name if name in axes else short_name(name, f"search.{axis.key}.{where}")

    when = {known(name, "when"): values for name, values in axis.when.items()}
    return replace(axis, when=when, of=known(axis.of, "of") if axis.of else None)


def _in_order(space: Space) -> dict[str, SpaceAxis]:
    """The axes in the file's order, each after those that it depends on."""
    axes, ordered = space.axes, dict[str, SpaceAxis]()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise ConfigError(f"search.{axes[name].key}: depends on itself ({' → '.join((*trail, name))})")
        if name in axes and name not in ordered:
            for other in (setter.name for needed in axes[name].depends_on for setter in space.setters(needed)):
                visit(other, (*trail, name))
            ordered[name] = axes[name]

    for name in axes:
        visit(name, ())
    return ordered


def _with_condition(axis: SpaceAxis, space: Space) -> SpaceAxis:
    """The axis with the values of its `when` typed like the leaves that they are compared with."""
    when = {}
    for name, wanted in axis.when.items():
        where, others = f"search.{axis.key}.when.{name}", space.setters(name)
        path = others[0].path if others else trial_leaves()[name]
        values = tuple(as_leaf(path, value, where) for value in wanted)
        if not values:
            raise ConfigError(f"{where}: is empty")
        endless = [other for other in others if other.continuous]
        if endless:
            raise ConfigError(f"{where}: compares for equality, and {name} is continuous ({endless[0].kind})")
        listed = [other for other in others if other.kind != "of" and other.num_options <= 1000]
        options = [o for other in listed for o in other.options()] if listed and len(listed) == len(others) else values
        if not any(value in options for value in values):
            known = ", ".join(map(show, options))
            raise ConfigError(f"{where}: {show(values[0])} is never taken{guess(values[0], options)}; {name} is one of {known}")
        when[name] = values
    return replace(axis, when=when)


def _check_derived(axis: SpaceAxis, space: Space) -> None:
    where, source = f"search.{axis.key}", str(axis.of)
    setters = space.setters(source)
    if number_type(setters[0].path if setters else trial_leaves()[source]) is None:
        raise ConfigError(f"{where}.of: {source} is not a number")
    if space.base.get(source) is None and all(setter.when for setter in setters):
        raise ConfigError(f"{where}.of: {source} has no value in some trials; give the leaf one, or make it an axis")
    for root in _roots(setters, space):
        if axis.whole and root.continuous:
            raise ConfigError(f"{where}: {axis.leaf} is a whole number, and {root.name}, which it derives from, is continuous")
    for value in space.reach(axis.name):
        as_leaf(axis.path, value, f"{where}: {axis.formula}")


def _roots(axes: list[SpaceAxis], space: Space) -> Iterator[SpaceAxis]:
    for axis in axes:
        yield from _roots(space.setters(axis.of), space) if axis.of else [axis]


def _check_disjoint(space: Space) -> None:
    """Two axes of one leaf must have conditions on the same name with no value in common."""
    for leaf in dict.fromkeys(axis.leaf for axis in space.axes.values()):
        for one, other in itertools.combinations(space.setters(leaf), 2):
            if not any(name in other.when and not _common(values, other.when[name]) for name, values in one.when.items()):
                raise ConfigError(
                    f"search.{other.key}: sets {leaf} as search.{one.key} does, and both may be active in a trial; "
                    "give them conditions that exclude each other, e.g. `when: {method: sft}` and `when: {method: lora}`"
                )


def _common(values: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return any(value in others for value in values)


def _check_sweep(config: SweepConfig, space: Space) -> None:
    points.point_settings(config, space)
    lengths = [name for name in LENGTHS if any(not axis.when for axis in space.setters(name))]
    if len(lengths) > 1:
        raise ConfigError(f"search.{lengths[0]}: a trial has one length, and {' and '.join(lengths)} are axes")
    refusals.check_suite_at(config)
    if config.phases is None:  # else each phase is checked with its own
        refusals.check_objectives(config)
    if config.sampler.name == "grid":
        space.require_finite("a grid sweep")
    if config.sampler.name == "cmaes" and not any(a.sampled and not a.values and not a.when for a in space.axes.values()):
        raise ConfigError(
            "sampler.name: cmaes searches ranges (uniform, log_uniform, int_uniform, quantised) that every trial has, and there "
            "is none; use tpe, gp, nsga2, random, qmc or grid"
        )
    if space.setters("seed") and config.sampler.seeds:
        raise ConfigError("sampler.seeds: `seed` is an axis already; give one of the two")
    if len(set(config.sampler.seeds)) < len(config.sampler.seeds):
        raise ConfigError(f"sampler.seeds: a seed stands twice (got {list(config.sampler.seeds)})")
    for params in (*space.combinations(refusals.DECIDING), *space.beyond):
        refusals.check(config, space.trial_config(params, config.trial))
    taught = [m for m in space.reach("method") if m in ("kd", "neo")]
    if not taught and any(weight > 0 for weight in space.reach("alignment_weight")):
        where = "search" if space.setters("alignment_weight") else "distill"
        raise ConfigError(
            f"{where}.alignment_weight: compares hidden states with a teacher's, and method "
            f"{' and '.join(space.reach('method'))} has none (with one: kd, neo)"
        )
    if taught and config.teacher is None:
        where = "search.method" if space.setters("method") else "method"
        raise ConfigError(f"{where}: {' and '.join(taught)} needs a `teacher` section (without one: lora, sft)")
