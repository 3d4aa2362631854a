"""Which settings are tried first? The `points` of a sweep file, completed and checked against the space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_ray.axes import SpaceAxis, as_leaf, show
from neo_ray.config import Axis, SweepConfig
from neo_ray.mistakes import guess
from neo_ray.settings import ConfigError

if TYPE_CHECKING:
    from neo_ray.space import Space


def point_settings(config: SweepConfig, space: Space) -> list[dict[str, Any]]:
    """The params of each point, in the file's order; a point that stands twice, once.

    Raises:
        ConfigError: an unknown or inactive axis, a value outside it, or one that is missing.
    """
    if config.points and config.sampler.name == "grid":
        raise ConfigError(
            "points: a grid runs all its settings and no others; take another sampler.name, or add the values to the axes"
        )
    found: list[dict[str, Any]] = []
    for index, point in enumerate(config.points):
        params = completed(space, point, f"points.{index}")
        found += [params] if params not in found else []
    return found


def reference_setting(config: SweepConfig, space: Space) -> dict[str, Any] | None:
    """The setting that the best are confirmed against, which may lie outside of the space; None without that phase."""
    confirm = config.phases.confirm if config.phases else None
    return completed(space, confirm.reference, "phases.confirm.reference", anywhere=True) if confirm else None


def completed(space: Space, point: dict[str, Any], where: str, anywhere: bool = False) -> dict[str, Any]:
    """The setting that a point means: what it leaves out is the sweep file's own value. `anywhere`: also outside of the space."""
    given = {_axis(space, name, where).name: value for name, value in point.items()}

    def value_of(axis: SpaceAxis) -> Any:
        value, named = given.get(axis.name, space.base[axis.leaf]), axis.name in given
        if value is None and not named:
            raise ConfigError(f"{where}: {axis.name} is missing, and the sweep file has no value of its own")
        if not named and not anywhere and not _holds(axis, value):
            raise ConfigError(
                f"{where}: {axis.name} is missing, and the sweep file's own {show(value)} is not in search.{axis.key}"
            )
        value = as_leaf(axis.path, value, f"{where}.{axis.name}")
        if not anywhere and not _holds(axis, value):
            raise ConfigError(f"{where}.{axis.name}: {show(value)} is not a value of search.{axis.key} ({axis.text})")
        return value

    params = space.setting(value_of)
    idle = [name for name in given if name not in params]
    if idle:
        raise ConfigError(f"{where}.{idle[0]}: does not exist in this setting ({space.axes[idle[0]].text})")
    return params


def level_axes(config: SweepConfig, space: Space, levels: dict[str, tuple[Any, ...]], where: str) -> dict[str, Axis]:
    """The `search` section with lists of values in place of some axes.

    Raises:
        ConfigError: an unknown axis, or a value outside it.
    """
    search = dict(config.search)
    for name, values in levels.items():
        axis = _axis(space, name, where)
        for value in values:
            if not _holds(axis, as_leaf(axis.path, value, f"{where}.{name}")):
                raise ConfigError(f"{where}.{name}: {show(value)} is not a value of search.{axis.key} ({axis.text})")
        kept = {key: value for key, value in (("sets", search[axis.key].sets), ("when", search[axis.key].when)) if value}
        search[axis.key] = Axis.model_validate({**kept, "grid": values})
    return search


def _axis(space: Space, name: str, where: str) -> SpaceAxis:
    """The sampled axis of that name or path."""
    sampled = [axis for axis in space.axes.values() if axis.sampled]
    axis = next((axis for axis in space.axes.values() if name in (axis.name, axis.key, axis.path)), None)
    if axis is None:
        names = [axis.name for axis in sampled]
        raise ConfigError(f"{where}.{name}: unknown axis{guess(name, names)}; allowed: {', '.join(names)}")
    if not axis.sampled:
        raise ConfigError(f"{where}.{name}: is not chosen: it is {axis.text}")
    return axis


def _holds(axis: SpaceAxis, value: Any) -> bool:
    """Is it a value of the axis? On one of its steps, where it has steps."""
    if axis.values:
        return value in axis.values
    if isinstance(value, str | list) or not axis.low <= value <= axis.high:
        return False
    return not axis.step or axis.option(round((value - axis.low) / axis.step)) == value
