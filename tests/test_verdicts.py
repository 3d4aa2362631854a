"""Is the page of the quickstart study what its guidelines say?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from verdicts import FOLDER, page, rendered


def test_the_page_is_what_the_guidelines_say() -> None:
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == page(FOLDER)


def test_a_verdict_that_changes_changes_the_page(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "guidelines.json", tmp_path)
    found = json.loads((tmp_path / "guidelines.json").read_text())
    (law,) = (g for g in found["guidelines"] if g["place"] == 2)
    law["verdict"] = "refuted" if law["verdict"] == "supported" else "supported"
    (tmp_path / "guidelines.json").write_text(json.dumps(found))
    assert rendered(tmp_path) != rendered(FOLDER)
    assert {line.split("|")[1].strip() for line in rendered(FOLDER).splitlines()[2:]} == {str(n) for n in range(1, 12)}
