"""Does the teacher's forward see every unique token exactly once, whatever the trials do with them? Two real sweeps, one cache.

Reference: a hook on the teacher's network in every process of the sweeps, which writes down the tokens of each forward pass.
For the quickstart pair, docs/studies/once: the counters of its records against its data, counted token by token.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import once
import pytest
from doors import finish, start, sweep_file
from test_faults import FAULT
from tiny import World

from neo_ray.account import Account, account
from neo_ray.loading import load
from neo_ray.records import Journal, TrialRecord, load_records

WATCHED = """
target = "neo_ray.models"

def inject(models):
    import os, pathlib
    load_model, read = models.load_model, str(pathlib.Path(__file__).with_name("read"))

    def look(network, given, named):
        seen = named.get("attention_mask")
        seen = seen if seen is not None else named.get("input_ids", given[0] if given else None) >= 0
        descriptor = os.open(read, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{int(seen.sum())}\\n".encode())
        os.close(descriptor)

    def loaded(path, *rest, **named):
        model = load_model(path, *rest, **named)
        if str(path).endswith("teacher"):
            models.decoder(model).register_forward_pre_hook(look, with_kwargs=True)
        return model

    models.load_model = loaded
"""
SETTINGS: dict[str, Any] = {
    "search": {"batch_size": {"grid": [2, 4, 8]}, "packing": {"grid": [False, True]}},
    "training": {"epochs": 2, "micro_batch_size": 2, "dtype": "fp32", "learning_rate": "1e-2"},
    "distill": {"kd_ratio": 0.5},
    "evaluation": {"points": 2},
    "scheduler": {"name": "none"},
}


def swept(
    world: World, folder: Path, name: str, mode: str, seeds: list[int], num_trials: int = 16
) -> tuple[Account, list[TrialRecord], str]:
    storage = {"path": str(folder / "results"), "cache": str(folder / "cache")}
    data = {"source": str(world.data), "max_length": 48, "train_limit": 40, "select_fraction": 0.1, "report_fraction": 0.1}
    sampler = {"name": "grid", "seeds": seeds, "num_trials": num_trials}
    changes = {"name": name, "sampler": sampler, "storage": storage, "data": data, "targets": {"mode": mode}, **SETTINGS}
    process = start(sweep_file(world, folder, **changes), also_import=folder)
    text = finish(process)
    assert process.returncode == 0, text
    records = load_records(folder / "results" / name)
    assert all(record.state == "COMPLETE" for record in records), [record.error for record in records]
    return account(Journal(folder / "results" / name).events(), records), records, text


def read_by_the_network(folder: Path) -> int:
    path = folder / "read"
    return sum(map(int, path.read_text().split())) if path.exists() else 0


@pytest.mark.slow
def test_every_unique_token_is_read_once_for_two_sweeps(tiny_world: World, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT + WATCHED)
    first, records, text = swept(tiny_world, tmp_path, "explore", "projection", [0, 1, 2])
    assert len(records) == 16 and {r.params["packing"] for r in records} == {False, True}
    assert read_by_the_network(tmp_path) == first.builder_tokens == first.store_tokens > 0
    assert first.store_rows == first.labels > 0
    assert first.num_trials == 16 and first.teacher_tokens == 0 and all(r.details["target_rows"] > 0 for r in records)
    assert first.spared_tokens > 16 * first.store_tokens, "two epochs each, and held-out text once a worker"
    told = f"The teacher read {first.store_tokens:,} tokens once for 16 trials; live it would have been {first.spared_tokens:,}."
    report = tmp_path / "results" / "explore" / "report.md"
    assert told in " ".join(text.split()) and told in report.read_text()

    again, records, text = swept(tiny_world, tmp_path, "confirm", "projection", [7, 8, 9])
    assert {r.seed for r in records} == {7, 8, 9} and again.num_trials == 16
    assert read_by_the_network(tmp_path) == first.store_tokens, "not one token more"
    assert (again.builder_tokens, again.store_tokens, again.teacher_tokens) == (0, first.store_tokens, 0)
    assert f"The teacher read none of the store's {first.store_tokens:,} tokens" in " ".join(text.split())

    living, _, _ = swept(tiny_world, tmp_path, "living", "live", [0], num_trials=2)
    probe = 2 * 9  # made up: by which a worker sees once whether the teacher tells packed sequences apart
    assert read_by_the_network(tmp_path) - first.store_tokens - probe == living.teacher_tokens > 0 == living.target_rows


def test_the_page_of_the_quickstart_pair_is_what_its_records_say() -> None:
    assert (once.FOLDER / "README.md").read_text(encoding="utf-8") == once.page(once.FOLDER)


def test_the_quickstart_pair_s_teacher_read_every_token_once_and_rows_are_labelled_positions() -> None:
    config, (data, found, records) = load(once.FOLDER / "sweep.yaml"), once.loaded(once.FOLDER)
    unique = {name: sum(split[name] for split in data.values()) for name in ("tokens", "labels")}
    in_trials = sum(record.details["teacher_tokens"] for record in records)
    assert found.builder_tokens + in_trials == unique["tokens"] == found.store_tokens > 0 == in_trials == found.restarts
    assert found.store_rows == found.labels == unique["labels"] > 0

    phases = [record.phase for record in records]
    assert phases.count("map") == 16 and phases.count("confirm") >= 2 and len(phases) == found.num_trials
    assert {record.state for record in records} == {"COMPLETE"} and config.trial.training.epochs == 2
    mapped = {(record.params["batch_size"], record.seed) for record in records if record.phase == "map"}
    assert mapped == {(2, 0), (2, 1), (4, 0), (4, 1)}
    assert not {record.seed for record in records if record.phase == "confirm"} & {0, 1}
    expected = once.rows_of_a_trial(data, config.evaluation.points, epochs=2)
    rows = [record.details["target_rows"] for record in records]
    assert set(rows) <= set(expected) and found.target_rows == sum(rows)
    assert {record.tokens for record in records} == {2 * data["train"]["tokens"]}


def test_another_counter_is_seen(tmp_path: Path) -> None:
    shutil.copytree(once.FOLDER, tmp_path / "once")
    text = (tmp_path / "once" / "journal.jsonl").read_text()
    (tmp_path / "once" / "journal.jsonl").write_text(text + text.replace('"shard": "', '"shard": "again-'))
    assert once.loaded(tmp_path / "once")[1].builder_tokens == 2 * once.loaded(once.FOLDER)[1].builder_tokens
    assert once.rendered(tmp_path / "once") != once.rendered(once.FOLDER)
