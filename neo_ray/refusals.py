"""Which settings do not go together? Refused before anything starts, by their paths in the file."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from urllib.parse import urlsplit

from neo_ray.config import SweepConfig
from neo_ray.searching import of_suite
from neo_ray.settings import ConfigError, TrialConfig
from neo_ray.storage import Remote

DECIDING = ("method", "variant", "modules_to_save", "dtype", "zero_stage", "offload_optimizer", "offload_parameters", "nvme_path")
"""The leaves that the checks read: every combination of them that a sweep can have is looked at."""


def check(config: SweepConfig, trial: TrialConfig) -> None:
    """Raises ConfigError for the first thing in a trial of this sweep that cannot be."""
    for rule in (_precision, _offload, _teacher, _quantization):
        for message in rule(config, trial):
            raise ConfigError(message)


def _precision(config: SweepConfig, trial: TrialConfig) -> Iterator[str]:
    if trial.training.dtype == "fp16" and not config.resources.gpus_per_worker:
        yield "training.dtype: fp16 needs workers with a GPU (resources.gpus_per_worker is 0); on CPUs: auto, bf16 or fp32"
    if (
        trial.training.dtype == "fp16"
        and (trial.deepspeed.extra.get("zero_optimization") or {}).get("compute_grad_norm") is False
    ):
        yield "deepspeed.extra: training.dtype fp16 finds overflows by the gradient norm, and `compute_grad_norm: false` has none"


def _offload(config: SweepConfig, trial: TrialConfig) -> Iterator[str]:
    deepspeed, stage = trial.deepspeed, trial.deepspeed.zero_stage
    given = {"offload_optimizer": deepspeed.offload_optimizer, "offload_parameters": deepspeed.offload_parameters}
    for key, place in given.items():
        where, lowest = f"deepspeed.{key}: {place}", 3 if key == "offload_parameters" or place == "nvme" else 1
        if place != "none" and stage < lowest:
            allowed = "3" if lowest == 3 else "1, 2 or 3"
            yield f"{where} needs deepspeed.zero_stage {allowed} (got {stage}); without it: deepspeed.{key}: none"
        if place == "nvme" and not deepspeed.nvme_path:
            yield f"{where} needs deepspeed.nvme_path: a folder on a local disk of every node"
        if place == "nvme" and not config.resources.gpus_per_worker:
            yield f"{where} needs workers with a GPU (resources.gpus_per_worker is 0); on CPUs: none or cpu"
    if deepspeed.nvme_path and "nvme" not in given.values():
        yield "deepspeed.nvme_path: nothing is offloaded there; give deepspeed.offload_optimizer or offload_parameters: nvme"


def _teacher(config: SweepConfig, trial: TrialConfig) -> Iterator[str]:
    if config.teacher is not None and config.teacher.placement == "sharded" and config.resources.workers_per_trial < 2:
        yield (
            "teacher.placement: sharded needs resources.workers_per_trial of at least 2 "
            f"(got {config.resources.workers_per_trial}); with one: replicated or offloaded"
        )


def _quantization(config: SweepConfig, trial: TrialConfig) -> Iterator[str]:
    given = {"student": config.student.quantization, "teacher": config.teacher.quantization if config.teacher else "none"}
    for side, bits in given.items():
        where = f"{side}.quantization: {bits}"
        if bits != "none" and not config.resources.gpus_per_worker:
            yield f"{where} needs workers with a GPU (resources.gpus_per_worker is 0); on CPUs: none"
    if config.teacher is not None and given["teacher"] != "none" and config.teacher.placement != "replicated":
        yield f"teacher.quantization: {given['teacher']} goes with teacher.placement replicated (got {config.teacher.placement})"
    if given["student"] == "none":
        return
    where = f"student.quantization: {given['student']}"
    if not trial.has_adapter:
        yield f"{where} cannot be trained whole, as method {trial.method} does; with an adapter: lora, neo"
    if trial.deepspeed.zero_stage == 3:
        yield f"{where} cannot be partitioned by deepspeed.zero_stage 3; with it: 0, 1 or 2"
    if trial.lora.variant in ("pissa", "olora"):
        others = "lora, rslora, dora, moslora"
        yield f"{where} has no plain weights for lora.variant {trial.lora.variant} to start from; with it: {others}"
    whole = [name for name in trial.lora.modules_to_save if not any(kind in name for kind in ("norm", "embed", "head"))]
    if whole:
        yield f"{where} leaves no plain weights of {whole[0]!r} for lora.modules_to_save; with it: norms, embeddings, the head"


def check_suite_at(config: SweepConfig) -> None:
    """Benchmarks in `confirm` alone need that phase, and choose nothing. Raises ConfigError."""
    if config.evaluation.suite_at != "confirm":
        return
    if config.phases is None or config.phases.confirm is None:
        raise ConfigError("evaluation.suite_at: confirm is a phase that this sweep does not have; end, rungs, or phases.confirm")
    metric = next((objective.metric for objective in config.objective.all if of_suite(objective.metric)), None)
    if metric is not None:
        raise ConfigError(
            f"evaluation.suite_at: confirm measures {metric} of the settings that are chosen already, and objective.metric is "
            "to choose by it; end, or rungs"
        )


def check_objectives(config: SweepConfig) -> None:
    """What cannot look for several things at once. Raises ConfigError."""
    benchmarks = [objective.metric for objective in config.objective.all if of_suite(objective.metric)]
    if benchmarks and config.evaluation.suite is None:
        raise ConfigError(f"objective.metric: {benchmarks[0]} is of a suite of benchmarks, and there is no evaluation.suite")
    early = of_suite(config.objective.metric) and config.evaluation.suite_at == "end"
    if early and config.scheduler.name != "none":
        raise ConfigError(
            f"evaluation.suite_at: end measures {config.objective.metric} of complete trials alone, and the scheduler ranks by "
            "it before; rungs, or scheduler.name: none"
        )
    number = len(config.objective.all)
    if number > 1 and config.sampler.name == "cmaes":
        raise ConfigError(
            f"sampler.name: cmaes has one objective, and there are {number}; with several: nsga2, tpe, gp, random, qmc, grid"
        )
    if number > 1 and config.scheduler.name != "none":
        raise ConfigError(
            f"scheduler.name: {config.scheduler.name} stops trials by the first objective alone, and with them those that are "
            f"best in the other {number - 1}; with several objectives: none"
        )


def check_harness() -> None:
    """Raises ConfigError where benchmarks cannot be asked."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("evaluation.suite: needs the LM Evaluation Harness: pip install -c constraints.txt -e '.[lm_eval]'")


def check_installed(config: SweepConfig) -> None:
    """What a sweep needs where it runs; its records are read anywhere. Raises ConfigError."""
    exploit = config.phases.exploit if config.phases else None
    sampler, where = (exploit.sampler, "phases.exploit.sampler") if exploit else (config.sampler, "sampler")
    if sampler.name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise ConfigError(
            f"{where}.name: cmaes needs the package cmaes, which is not installed; "
            "pip install -c constraints.txt -e '.[cmaes]', or tpe, gp, nsga2"
        )
    if config.evaluation.suite is not None:
        check_harness()
    if config.storage.study is not None:
        _check_database(config.storage.study)
    for side, section in (("student", config.student), ("teacher", config.teacher)):
        if section is not None and section.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{side}.quantization: {section.quantization} needs bitsandbytes, which is not installed; "
                "pip install 'neo_ray[quantization]', or none"
            )
    for name in ("wandb", "mlflow"):
        if getattr(config.logging, name) is not None and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"logging.{name}: needs the package {name}, which is not installed; pip install -c constraints.txt -e '.[{name}]'"
            )
    _check_trackers(config)


def _check_trackers(config: SweepConfig) -> None:
    wandb, mlflow = config.logging.wandb, config.logging.mlflow
    if wandb is not None and wandb.mode == "offline" and isinstance(config.results, Remote):
        raise ConfigError(
            f"logging.wandb.mode: offline writes into a results folder on disk, and storage.path {config.storage.path} is an "
            "object store, to which that is not uploaded; online, or a storage.path that is a folder"
        )
    if mlflow is not None:
        uri = mlflow.tracking_uri or importlib.import_module("mlflow").get_tracking_uri()
        known = importlib.import_module("mlflow.environment_variables")
        allowed = getattr(known, "MLFLOW_ALLOW_FILE_STORE", None)  # not in an older MLflow, which takes folders
        is_folder = urlsplit(uri).scheme in ("", "file") and uri not in ("databricks", "databricks-uc", "uc")
        if is_folder and allowed is not None and not allowed.get():
            raise ConfigError(
                f"logging.mlflow.tracking_uri: {uri} is a folder, which this version of MLflow refuses; a server's URL, "
                "sqlite:////path/mlflow.db, or MLFLOW_ALLOW_FILE_STORE=true in the environment"
            )


def _check_database(url: str) -> None:
    import sqlalchemy

    try:
        if sqlalchemy.make_url(url).password is not None:
            raise ConfigError(
                "storage.study: the URL holds a password, which sweep.yaml would show; "
                "leave it to the database's own means, e.g. ~/.pgpass"
            )
        sqlalchemy.create_engine(url)  # imports the driver, and connects to nothing
    except ImportError as error:
        raise ConfigError(
            f"storage.study: {url} needs the package {error.name}, which is not installed; pip install it"
        ) from None
    except sqlalchemy.exc.ArgumentError as error:
        raise ConfigError(f"storage.study: {url} is no database URL ({error})") from None
