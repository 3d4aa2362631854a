"""Does a trial whose optimizer or weights lie in host memory give the curve of one that has all on the device?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_train
import torch
from test_space import sweep
from test_train import a_trial, curve, interrupted_and_resumed, run

from neo_ray import placement
from neo_ray import train as training
from neo_ray.memory import memory_per_worker
from neo_ray.parts import Sources
from neo_ray.settings import ConfigError, DeepSpeedConfig
from neo_ray.shapes import shape_from_name

sources = test_train.sources
process_group = test_train.process_group


def placed(stage: int, **places: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig(zero_stage=stage, **places)  # type: ignore[arg-type]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every engine that is built."""
    built: list[Any] = []
    build = training.build_engine

    def building(*arguments: Any) -> Any:
        built.append(build(*arguments))
        return built[-1]

    monkeypatch.setattr(training, "build_engine", building)
    return built


@pytest.mark.parametrize(
    ("stage", "optimizer", "parameters"),
    [(1, "cpu", "none"), (2, "cpu", "none"), (3, "cpu", "cpu")],
)
def test_offload_changes_no_result_and_goes_on_from_a_checkpoint(
    sources: Sources, tmp_path: Path, engines: list[Any], stage: int, optimizer: str, parameters: str
) -> None:
    trial = a_trial(deepspeed=placed(stage, offload_optimizer=optimizer, offload_parameters=parameters))
    expected = curve(run(sources, a_trial(stage))[0])
    whole, outcome = run(sources, trial)
    assert engines[-1].zero_cpu_offload() == (optimizer == "cpu"), "DeepSpeed was asked for it"
    assert (engines[-1].zero_offload_param() is not None) == (parameters == "cpu")
    for ours, theirs in zip(curve(whole), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)

    resumed, again = interrupted_and_resumed(sources, trial, tmp_path)
    assert curve(resumed) == curve(whole) and again.metrics == outcome.metrics


def test_every_worker_has_a_swap_folder_of_its_own_that_goes_away(tmp_path: Path) -> None:
    settings = placed(3, offload_optimizer="nvme", offload_parameters="nvme", nvme_path=str(tmp_path))
    one, other = placement.swap_folder(settings), placement.swap_folder(settings)
    assert one and other and one.name != other.name and Path(one.name).parent == tmp_path
    sections = placement.offload_sections(settings, torch.nn.Linear(8, 4), one.name)
    assert sections["offload_optimizer"] == {"device": "nvme", "nvme_path": one.name}
    assert sections["offload_param"] == {"device": "nvme", "nvme_path": one.name, "buffer_size": 32}
    del one, other
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"^deepspeed.nvme_path: /nowhere/at/all cannot be written: No such file"):
        placement.swap_folder(settings.model_copy(update={"nvme_path": "/nowhere/at/all"}))


def test_what_lies_in_host_memory_is_not_counted_on_a_gpu() -> None:
    shape = shape_from_name("llama-3.2-1b")
    assert shape is not None

    def needs(gpus: int, **places: Any) -> dict[str, int]:
        config = sweep(resources={"gpus_per_worker": gpus}, method="sft", training={"dtype": "bf16"})
        return memory_per_worker(config, config.trial.model_copy(update={"deepspeed": placed(3, **places)}), shape, shape)

    assert needs(1, offload_optimizer="cpu")["optimizer"] == 0 < needs(1)["optimizer"]
    assert needs(0, offload_optimizer="cpu") == needs(0)
