"""Is guidelines.json what its schema says, and the schema what guidelines.json holds? Over planted and committed studies."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from planted import everything, planted
from test_analyze import STRANGE, folder_with
from test_confirmed import STUDY
from test_confirmed import records as confirmed
from test_laws import grid, truth
from test_objectives import RECORDS, several
from test_readme import table

from neo_ray.analyze import analyse, guidelines_json

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "neo_ray" / "guidelines.schema.json").read_text(encoding="utf-8"))
COMMITTED = sorted((ROOT / "docs" / "studies").rglob("guidelines.json"))
PLANTED: dict[str, tuple[Any, ...]] = {
    "everything": (everything(),),
    "a map with a law": (planted(grid(), truth, noise=0.01, seeds=(0, 1)),),
    "confirmed": (confirmed(), STUDY),
    "several objectives": (RECORDS, several()),
    "all failed": (STRANGE["all failed"],),
    "not finite": (STRANGE["infinite"],),
    "one bare trial": (STRANGE["one bare trial"],),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Study → its guidelines.json."""
    folder = tmp_path_factory.mktemp("studies")
    made = {name: guidelines_json(analyse(folder_with(folder / name, *given))) for name, given in PLANTED.items()}
    again = {f"{path.parent.name}, again": guidelines_json(analyse(path.parent)) for path in COMMITTED}
    kept = {path.parent.name: path.read_text(encoding="utf-8") for path in COMMITTED}
    return {name: json.loads(text) for name, text in {**made, **again, **kept}.items()}


def documented(schema: dict[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and schema of every key."""
    for key, inner in schema.get("properties", {}).items():
        yield f"{at}.{key}", inner
        yield from documented(inner, f"{at}.{key}")
    if "items" in schema:
        yield from documented(schema["items"], at)


def seen(value: Any, schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """Paths of the keys that hold something."""
    if isinstance(value, list):
        for each in value:
            yield from seen(each, schema.get("items", {}), at)
    elif isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if value.get(key) is not None:
                yield f"{at}.{key}"
                yield from seen(value[key], inner, f"{at}.{key}")


def test_every_key_of_every_study_is_documented(outputs: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    judge = Draft202012Validator(SCHEMA)
    wrong = {name: [f"{e.json_path}: {e.message[:200]}" for e in judge.iter_errors(data)] for name, data in outputs.items()}
    assert len(COMMITTED) >= 2 and {name: errors for name, errors in wrong.items() if errors} == {}


def test_every_documented_key_is_in_some_study(outputs: dict[str, Any]) -> None:
    found = {path for data in outputs.values() for path in seen(data, SCHEMA)}
    assert {path for path, _ in documented(SCHEMA)} - found == set()


def test_a_key_without_a_word_or_beside_the_schema_is_found(outputs: dict[str, Any]) -> None:
    assert [path for path, inner in documented(SCHEMA) if not inner.get("description")] == []
    objects = [(path, inner) for path, inner in documented(SCHEMA) if "properties" in inner]
    assert [path for path, inner in [*objects, ("", SCHEMA)] if inner["additionalProperties"] is not False] == []
    data = json.loads(json.dumps(outputs["everything"]))
    data["guidelines"][0]["scope"]["wheels"] = 4
    del data["generated_from"]["mode"]
    data["noise"]["df"] = 1.5
    judge = Draft202012Validator(SCHEMA)
    assert {e.json_path for e in judge.iter_errors(data)} == {"$.guidelines[0].scope", "$.generated_from", "$.noise.df"}


def test_the_page_names_the_schema_and_its_keys_and_the_package_has_it() -> None:
    page = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    assert "](../neo_ray/guidelines.schema.json)" in page
    named = [word for row in table(page, "key") for word in row[0].replace("`", "").split(", ")]
    assert sorted(named) == sorted(SCHEMA["properties"])
    assert SCHEMA["properties"]["schema_version"]["const"] == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "guidelines.schema.json" in project["tool"]["setuptools"]["package-data"]["neo_ray"]
