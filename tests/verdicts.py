"""What does the study of docs/studies/quickstart say to LLM-Neo's guidelines? The table of its page, from guidelines.json.

`PYTHONPATH=. python tests/verdicts.py` makes the study's report and page again from its records; test_verdicts.py compares.
"""

from __future__ import annotations

import json
from pathlib import Path

from neo_ray import analyze

FOLDER = Path(__file__).parent.parent / "docs" / "studies" / "quickstart"
BEGIN, END = "<!-- verdicts: begin -->", "<!-- verdicts: end -->"
SAID = {
    1: "larger ranks are better, to about 128",
    2: "a higher rank wants a lower learning rate",
    3: "a learning rate of 10 times that of full training",
    5: "kd_ratio 0.5 by default, 0.9 in a published model",
    8: "Neo is better than LoRA, KD and SFT",
    9: "MoSLoRA is as good as LoRA, or better",
    10: "rank 64, learning rate 2e-4, kd_ratio 0.5 by default",
    11: "a quarter less memory than KD",
}
"""LLM-Neo (arXiv 2411.06839, its README and model cards), by the number of the hypothesis in docs/statistics.md."""


def rendered(folder: Path) -> str:
    """One row a hypothesis of docs/statistics.md, in their order; claims are those of the report."""
    found = json.loads((folder / "guidelines.json").read_text(encoding="utf-8"))["guidelines"]
    rows = sorted((g for g in found if g["place"]), key=lambda g: (g["place"], g["hypothesis"]))
    lines = ["| | LLM-Neo says | hypothesis | verdict | claim |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (str(row["place"]), SAID.get(row["place"], ""), row["hypothesis"], row["verdict"], row["claim"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page(folder: Path) -> str:
    """README.md with the table that its guidelines give."""
    before, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{rendered(folder)}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    analyze.write(analyze.analyse(FOLDER.relative_to(Path.cwd())), FOLDER)
    (FOLDER / "report.html").unlink()  # 5 MB of what is there already
    (FOLDER / "README.md").write_text(page(FOLDER), encoding="utf-8")
