"""Does every mistake in a sweep file end in one line that names the place, the value and what is allowed?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from neo_ray.config import SweepConfig, TargetsConfig
from neo_ray.loading import dump, load, plain, validate
from neo_ray.settings import ConfigError, TrialConfig, trial_leaves
from neo_ray.storage import Remote

BASE = """
name: demo
teacher: {model: some/teacher}
student: {model: some/student}
data: {source: passages.jsonl}
"""


def read(tmp_path: Path, text: str = "", *overrides: str) -> SweepConfig:
    path = tmp_path / "sweep.yaml"
    path.write_text(BASE + text, encoding="utf-8")
    return load(path, overrides)


def mistake(tmp_path: Path, text: str = "", *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora: {rnak: 3}", ["lora.rnak: unknown key", "did you mean `rank`", "alpha", "target_modules"]),
        ("lroa: {rank: 3}", ["lroa: unknown key", "did you mean `lora`"]),
        ("search: {rank: {chioce: [1]}}", ["search.rank.chioce: unknown key", "did you mean `choice`"]),
        ("trust_remote_code: true", ["trust_remote_code: unknown key"]),
    ],
)
def test_an_unknown_key_is_refused_with_a_guess(tmp_path: Path, text: str, expected: list[str]) -> None:
    message = mistake(tmp_path, text)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {learning_rate: fast}", ["training.learning_rate: ", "number", "'fast'"]),
        ("lora: {rank: fast}", ["lora.rank: ", "integer", "'fast'"]),
        ("lora: {rank: 2.5}", ["lora.rank: ", "2.5"]),
        ("lora: {rank: true}", ["lora.rank: must not be true or false"]),
        ("lora: {rank: 0}", ["lora.rank: ", "greater than or equal to 1", "got 0"]),
        ("lora: {variant: dorra}", ["lora.variant: ", "did you mean `dora`"]),
        ("lora: {target_modules: []}", ["lora.target_modules: must name at least one module"]),
        ("lora:", ["lora: must be a mapping of keys"]),
        ("training: 3", ["training: must be a mapping of keys", "got 3"]),
        ("distill: {kd_ratio: 1.1}", ["distill.kd_ratio: ", "less than or equal to 1", "1.1"]),
        ("distill: {temperature: 0}", ["distill.temperature: ", "greater than 0"]),
        ("training: {learning_rate: .inf}", ["training.learning_rate: ", "finite"]),
        ("training: {learning_rate: .nan}", ["training.learning_rate: ", "finite"]),
        ("seed: -1", ["seed: ", "greater than or equal to 0"]),
        ("method: nea", ["method: ", "did you mean `neo`"]),
        ("deepspeed: {zero_stage: 4}", ["deepspeed.zero_stage: ", "0, 1, 2 or 3"]),
        ("deepspeed: {zero_stage: true}", ["deepspeed.zero_stage: must not be true or false"]),
        ("deepspeed: {extra: {bf16: {enabled: true}}}", ["deepspeed.extra: `bf16`", "training.dtype"]),
        ("deepspeed: {extra: {zero_optimization: {stage: 1}}}", ["deepspeed.extra: ", "deepspeed.zero_stage"]),
        ("deepspeed: {extra: {zero_optimization: 3}}", ["deepspeed.extra: ", "mapping"]),
        ("evaluation: {max_tokens: 0}", ["evaluation.max_tokens: "]),
        ("sampler: {seeds: 3}", ["sampler.seeds: must be a list"]),
        ("resources: {concurrency: 0}", ["resources.concurrency: ", "at least 1"]),
        ("resources: {concurrency: manny}", ["resources.concurrency: ", "'auto'"]),
        (
            "resources: {workers_per_trial: 2, gpus_per_worker: 0.5}",
            ["resources: ", "gpus_per_worker: 0.5", "one worker a trial"],
        ),
        ("resources: {gpus_per_worker: 1.5}", ["resources: ", "whole number or below 1"]),
        ("search: {rank: {choice: []}}", ["search.rank: `choice` is empty"]),
        ("search: {rank: {grid: []}}", ["search.rank: `grid` is empty"]),
        ("search: {rank: {uniform: [3, 1]}}", ["search.rank: ", "low 3.0 > high 1.0"]),
        ("search: {learning_rate: {log_uniform: [0, 1]}}", ["search.learning_rate: ", "logarithm", "0.0"]),
        ("search: {learning_rate: {uniform: [a, 1]}}", ["search.learning_rate.uniform.0: ", "'a'"]),
        ("search: {learning_rate: {uniform: [1, .inf]}}", ["search.learning_rate.uniform.1: ", "finite"]),
        ("search: {learning_rate: {uniform: [1]}}", ["search.learning_rate.uniform.1: is required"]),
        ("search: {rank: {quantised: [1, 9, 0]}}", ["search.rank: ", "step 0.0"]),
        ("search: {rank: {times: 2}}", ["search.rank: give exactly one of", "of"]),
        ("search: {rank: {choice: [1], times: 2}}", ["search.rank: `times` and `plus` go with `of`"]),
        ("storage: {path: 'nowhere://x'}", ["storage.path: ", "neither a folder nor the URL", "'nowhere://x'"]),
        ("search: [rank]", ["search: must be a mapping of keys"]),
    ],
)
def test_a_wrong_value_is_refused_at_its_path(tmp_path: Path, text: str, expected: list[str]) -> None:
    message = mistake(tmp_path, text)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["student.model=null"], "student: give exactly one of `model` and `prune`"),
        (["student.prune.keep=3"], "student: give exactly one of `model` and `prune`"),
        (["student.model=null", "student.prune={keep: 3, layers: [0, 1]}"], "give exactly one of `layers` and `keep`"),
        (["student.model=null", "student.prune={}"], "give exactly one of `layers` and `keep`"),
        (["student.model=null", "student.prune.layers=[1, 0]"], "ascending, distinct"),
        (["student.model=null", "student.prune.layers=[1, 1]"], "ascending, distinct"),
        (["student.model=null", "student.prune.layers=[-1, 1]"], "not negative"),
        (["student.model=null", "student.prune.layers=[]"], "at least one"),
        (["training.steps=2", "training.tokens=1000"], "training: give one of epochs, tokens, steps, not tokens and steps"),
        (["search.rank={choice: [1], grid: [2]}"], "search.rank: give exactly one of"),
        (["search.rank={}"], "search.rank: give exactly one of"),
        (["teacher=null"], "method: neo needs a `teacher` section"),
        (["teacher=null", "method=kd"], "method: kd needs a `teacher` section"),
        (
            ["teacher=null", "method=lora", "student.model=null", "student.prune.keep=2"],
            "student.prune drops layers of the teacher",
        ),
        (
            ["teacher=null", "method=lora", "objective.metric=select_kl"],
            "objective.metric: select_kl is measured against a teacher",
        ),
        (["data.select_fraction=0.6", "data.report_fraction=0.4"], "data: select_fraction + report_fraction"),
        (["name=a/b"], "name: "),
        (["data.source=null"], "data.source: must be text"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in mistake(tmp_path, "", *overrides)


def test_methods_without_a_teacher_need_none(tmp_path: Path) -> None:
    assert read(tmp_path, "", "teacher=null", "method=lora").teacher is None
    assert read(tmp_path, "", "teacher=null", "method=sft").method == "sft"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "'1e-4'", ".0001"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"training: {{learning_rate: {text}}}").training.learning_rate == 1e-4


def test_scientific_notation_is_a_whole_number_where_one_stands(tmp_path: Path) -> None:
    assert read(tmp_path, "training: {tokens: 1e6}").training.tokens == 1_000_000


def test_a_number_that_yaml_makes_of_a_name_is_asked_to_be_quoted(tmp_path: Path) -> None:
    assert "data.subset: must be text; put a number in quotes" in mistake(tmp_path, "", "data.subset=0625")
    assert read(tmp_path, "", "data.subset='0625'").data.subset == "0625"


def test_a_trial_is_one_epoch_long_unless_told(tmp_path: Path) -> None:
    assert read(tmp_path).training.epochs == 1
    assert read(tmp_path, "training: {steps: 3}").training.epochs is None


def test_overrides_win_over_the_file_in_order(tmp_path: Path) -> None:
    config = read(tmp_path, "lora: {rank: 8, alpha: 3}", "lora.rank=16", "lora.rank=32", "distill.kd_ratio=1")
    assert (config.lora.rank, config.lora.alpha, config.distill.kd_ratio) == (32, 3, 1)


def test_null_unsets_a_length_and_takes_an_axis_or_a_source_away(tmp_path: Path) -> None:
    text = "training: {epochs: 2}\nsearch: {rank: {choice: [8]}, lora.alpha: {choice: [8]}}"
    config = read(tmp_path, text, "training.epochs=null", "training.steps=5", "search.rank=null", "search.lora.alpha=")
    assert config.training.steps == 5
    assert config.search == {}
    pruned = read(tmp_path, text, "student.model=null", "student.prune.keep=4")
    assert pruned.student.prune is not None
    assert pruned.student.prune.keep == 4
    assert read(tmp_path, text, "search=null").search == {}


def test_an_axis_name_may_hold_dots(tmp_path: Path) -> None:
    config = read(tmp_path, "", "search.lora.rank={choice: [4, 8]}", "search.beta1=0.8")
    assert config.search["lora.rank"].choice == (4, 8)
    assert config.search["beta1"].value == 0.8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rate", "write key=value"),
        ("=3", "write key=value"),
        ("name.x=3", "`name` is a value, not a section"),
        ("lora.rank=[1", "not valid YAML"),
        ("lora.rnak=1", "lora.rnak: unknown key (did you mean `rank`?)"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in mistake(tmp_path, "", override)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("lora:\n  rank: 3\n  rank: 4\n", 8, "the key `rank` stands twice"),
        ("name: other\n", 6, "the key `name` stands twice"),
        ("lora: {rank: [}\n", 6, "not valid YAML"),
        ("? [1, 2]\n: 3\n", 6, "a key must be a word"),
        ("seed: !!python/object/apply:os.getcwd []\n", 6, "not valid YAML"),
    ],
)
def test_invalid_yaml_is_refused_with_its_line(tmp_path: Path, text: str, line: int, expected: str) -> None:
    message = mistake(tmp_path, text)
    assert f"sweep.yaml, line {line}: " in message
    assert expected in message


@pytest.mark.parametrize("text", ["", "- 1\n", "hello\n"])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match="a sweep file is a mapping of sections"):
        load(tmp_path / "bad.yaml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "binary.yaml")


FULL = """
search:
  rank: {choice: [4, 8]}
  alpha: {of: rank, times: 2}
  learning_rate: {log_uniform: [1e-5, 1e-3]}
  dropout: {choice: [0, 0.1], when: {rank: 4}}
  warmup_ratio: {quantised: [0, 0.2, 0.05]}
  target_modules: {choice: [all-linear, [q_proj, v_proj]]}
  seed: {int_uniform: [0, 9]}
  weight_decay: {uniform: [0, 0.1]}
  gradient_checkpointing: {grid: [true, false]}
  beta1: 0.8
deepspeed: {extra: {zero_optimization: {reduce_bucket_size: 1000}}}
evaluation: {max_tokens: 100}
"""


def test_a_dumped_sweep_loads_back_to_the_same(tmp_path: Path) -> None:
    config = read(tmp_path, FULL, "student.model=null", "student.prune.layers=[0, 2]", "training.steps=7", "data.subset='0625'")
    again = validate(yaml.safe_load(dump(config)))
    assert again == config
    assert plain(again) == plain(config)
    assert [axis.kind for axis in again.search.values()] == [axis.kind for axis in config.search.values()]
    (tmp_path / "again.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "again.yaml") == config


def test_a_config_cannot_be_changed_after_loading(tmp_path: Path) -> None:
    config = read(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.lora.rank = 3  # type: ignore[misc]


def test_every_leaf_names_a_field_of_the_trial(tmp_path: Path) -> None:
    trial = read(tmp_path).trial
    assert type(trial) is TrialConfig
    for leaf, path in trial_leaves().items():
        node = trial
        for part in path.split("."):
            node = getattr(node, part)
        assert path.endswith(leaf)
    assert "max_tokens" not in trial_leaves()  # trials must be scored alike


def test_the_facts_import_nothing_heavy() -> None:
    code = (
        "import sys, neo_ray.config, neo_ray.space, neo_ray.plan, neo_ray.records;"
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets', 'optuna', 'pandas', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == "[]"


def test_targets_may_be_in_an_object_store_of_a_kind_that_there_is() -> None:
    section = TargetsConfig(path="s3://bucket/targets")
    assert section.path == "s3://bucket/targets"
    with pytest.raises(ValueError, match="nowhere://x is neither a folder nor the URL of an object store"):
        TargetsConfig(path="nowhere://x")
    config = SweepConfig.model_validate(
        {"name": "x", "student": {"model": "y"}, "data": {"source": "z"}, "method": "lora", "targets": {"path": "s3://b/t"}}
    )
    assert isinstance(config.targets_folder, Remote)
    apart = config.model_copy(update={"targets": TargetsConfig()})
    assert apart.targets_folder == config.cache / "targets"
