"""What values can one axis of a sweep take? An axis of the file, checked against the leaf that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from neo_ray.config import Axis
from neo_ray.mistakes import guess, reason
from neo_ray.settings import ConfigError, TrialConfig, trial_leaves

RANGES = ("uniform", "log_uniform", "int_uniform", "quantised")


@dataclass(frozen=True)
class SpaceAxis:
    """One checked axis; its values have the types of the leaf (lists stay lists, as in JSON)."""

    name: str
    """Of the parameter in records and in the study: the leaf, or the axis's own name where it `sets` one."""
    leaf: str
    path: str
    key: str
    """The name as the sweep file spells it, for messages."""
    kind: str
    whole: bool = False
    """The leaf holds whole numbers only."""
    values: tuple[Any, ...] = ()
    """All values of a grid or choice; the one of a fixed axis."""
    low: float = 0
    high: float = 0
    step: float | None = None
    of: str | None = None
    times: float = 1.0
    plus: float = 0.0
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def sampled(self) -> bool:
        return self.kind not in ("of", "value")

    @property
    def continuous(self) -> bool:
        return self.kind in ("uniform", "log_uniform")

    @property
    def depends_on(self) -> tuple[str, ...]:
        return (*((self.of,) if self.of else ()), *self.when)

    @property
    def num_options(self) -> int:
        """How many values a finite axis can take."""
        if self.values or self.kind == "of":
            return max(1, len(self.values))
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step))) + 1

    def option(self, index: int) -> Any:
        """The value number `index` of a finite axis. Decimal, so that 0.1 + 2 × 0.1 is 0.3."""
        if self.values:
            return self.values[index]
        return self.as_leaf(Decimal(str(self.low)) + index * Decimal(str(self.step)))

    def options(self) -> Iterator[Any]:
        return (self.option(index) for index in range(self.num_options))

    def as_leaf(self, number: Any) -> int | float:
        return int(number) if self.whole else float(number)

    def derive(self, source: float) -> int | float:
        """times × source + plus. Twelve digits, so that 3 × 0.1 is 0.3."""
        value = float(f"{source * self.times + self.plus:.12g}")
        if self.whole and value != int(value):
            raise ConfigError(
                f"search.{self.key}: {self.formula} is {value:g} where {self.of} is {source:g}, "
                f"and {self.leaf} must be a whole number"
            )
        return self.as_leaf(value)

    @property
    def labels(self) -> list[Any]:
        """The choices as Optuna stores them: a list is no primitive, so its JSON text stands for it."""
        return [json.dumps(v) if isinstance(v, list) else v for v in self.values]

    @property
    def formula(self) -> str:
        times = "" if self.times == 1 else f"{self.times:g} × "
        plus = "" if self.plus == 0 else f" {'+' if self.plus > 0 else '−'} {abs(self.plus):g}"
        return f"{times}{self.of}{plus}"

    @property
    def text(self) -> str:
        """What the axis ranges over, in words; two axes with the same text mean the same."""
        if self.kind == "of":
            what = self.formula
        elif self.values:
            what = ("always " if self.kind == "value" else "one of ") + ", ".join(map(show, self.values))
        else:
            low, high = show(self.as_leaf(self.low)), show(self.as_leaf(self.high))
            what = f"{low} … {high}" + {"log_uniform": ", log scale", "uniform": ""}.get(
                self.kind, f" in steps of {show(self.step)}"
            )
        conditions = [f"{name} is {' or '.join(map(show, allowed))}" for name, allowed in self.when.items()]
        leaf = "" if self.name == self.leaf else f"{self.leaf}: "
        return leaf + what + (f", where {' and '.join(conditions)}" if conditions else "")

    def _steps(self, number: float) -> int:
        return round((number - self.low) / (self.step or 1))

    def suggest(self, trial: Any) -> Any:
        """A value from an Optuna trial (or what looks like one)."""
        if self.values:
            labels = self.labels
            return self.values[labels.index(trial.suggest_categorical(self.name, labels))]
        if self.kind == "int_uniform" or (self.whole and self.step):
            return self.as_leaf(trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1)))
        number = trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.kind == "log_uniform")
        return self.option(self._steps(number)) if self.step else self.as_leaf(number)

    def optuna_value(self, value: Any) -> Any:
        """The inverse of `suggest`."""
        if self.values:
            if value not in self.values:
                raise ConfigError(f"search.{self.key}: {show(value)} is not {self.text}")
            return self.labels[self.values.index(value)]
        if not self.low <= value <= self.high:
            raise ConfigError(f"search.{self.key}: {show(value)} is not within {self.text}")
        if self.kind == "int_uniform" or self.whole:
            return int(value)
        # Optuna multiplies in binary: the same product as its own, so that an equal setting is an equal number there.
        return self.low + self._steps(value) * self.step if self.step else float(value)


def check_axis(key: str, raw: Axis) -> SpaceAxis:
    """One axis of the file, with the types of its leaf. `when` keeps the file's names and values until all axes are known.

    Raises:
        ConfigError: an unknown name, or a value that the leaf's schema refuses.
    """
    leaf = short_name(key, f"search.{key}") if raw.sets is None else short_name(raw.sets, f"search.{key}.sets")
    name = leaf if raw.sets is None else key
    if name != leaf and (name in trial_leaves() or not name.isidentifier()):
        raise ConfigError(f"search.{key}: sets {leaf}; its own name must be a word (letters, digits, _) that is no leaf's")
    path, kind = trial_leaves()[leaf], raw.kind
    number = number_type(path)
    axis = SpaceAxis(name, leaf, path, key, kind, whole=number is int)
    when = {k: _several(v) for k, v in (raw.when or {}).items()}
    if kind in RANGES:
        return replace(axis, when=when, **_bounds(axis, raw, number))
    if kind == "of":
        if number is None:
            raise ConfigError(f"search.{key}: {leaf} is not a number, so it cannot be derived from `{raw.of}`")
        return replace(axis, when=when, of=str(raw.of), times=raw.times, plus=raw.plus)
    values = tuple(as_leaf(path, v, f"search.{key}") for v in ((raw.value,) if kind == "value" else getattr(raw, kind)))
    twice = [v for i, v in enumerate(values) if v in values[:i]]
    if twice:
        raise ConfigError(f"search.{key}: the value {show(twice[0])} stands twice")
    return replace(axis, when=when, values=values)


def short_name(name: str, where: str) -> str:
    """The leaf that a name means, given as leaf (`rank`) or path (`lora.rank`). Raises ConfigError naming `where`."""
    leaves = trial_leaves()
    by_path = {path: leaf for leaf, path in leaves.items()}
    if name not in leaves and name not in by_path:
        close = guess(name, [*leaves, *by_path])
        raise ConfigError(f"{where}: unknown axis{close}; allowed: {', '.join(leaves)}")
    return by_path.get(name, name)


def as_leaf(path: str, value: Any, where: str) -> Any:
    """`value` as the leaf at `path` of the trial config holds it, in JSON types. Raises ConfigError naming `where`."""
    if value is None:
        raise ConfigError(f"{where}: null is not a value of an axis")
    section, _, leaf = path.rpartition(".")
    try:
        trial = TrialConfig.model_validate({section: {leaf: value}} if section else {leaf: value})
    except ValidationError as error:
        raise ConfigError(f"{where}: {reason(error.errors()[0])}") from None
    return leaf_value(trial, path)


def leaf_value(trial: TrialConfig, path: str) -> Any:
    node: Any = trial
    for part in path.split("."):
        node = getattr(node, part)
    return _as_json(node)


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


def number_type(path: str) -> type | None:
    """int, float, or None where the leaf at `path` is not a number."""
    model: Any = TrialConfig
    *sections, leaf = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    annotation = model.model_fields[leaf].annotation
    if get_origin(annotation) is Literal:
        return int if all(type(a) is int for a in get_args(annotation)) else None
    options = get_args(annotation) or (annotation,)
    return int if int in options else float if float in options else None


def show(value: Any) -> str:
    """A value as the file would have it."""
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _bounds(axis: SpaceAxis, raw: Axis, number: type | None) -> dict[str, Any]:
    """low, high and step of a range, each a possible value of the leaf."""
    where, (low, high, *rest) = f"search.{axis.key}", getattr(raw, axis.kind)
    if number is None:
        raise ConfigError(f"{where}: `{axis.kind}` needs a number, and {axis.leaf} is none; use choice: [...]")
    if axis.whole and axis.kind in ("uniform", "log_uniform"):
        instead = f"int_uniform: [{low:g}, {high:g}]" if axis.kind == "uniform" else "choice: [2, 4, 8, ...]"
        raise ConfigError(f"{where}: {axis.leaf} is a whole number, and `{axis.kind}` is not; use {instead}")
    step = rest[0] if rest else 1 if axis.kind == "int_uniform" else None
    if axis.whole and step and not (float(low).is_integer() and float(step).is_integer()):
        raise ConfigError(f"{where}: {axis.leaf} is a whole number; low {low:g} and step {step:g} must be, too")
    if step:  # Optuna warns of a last step that does not fit; the values are the same without it
        low, step = Decimal(str(low)), Decimal(str(step))
        high = low + (Decimal(str(high)) - low) // step * step
    return {
        "low": as_leaf(axis.path, axis.as_leaf(low), where),
        "high": as_leaf(axis.path, axis.as_leaf(high), where),
        "step": axis.as_leaf(step) if step else None,
    }
