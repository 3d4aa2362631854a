"""What does a sweep file say? One typed, frozen tree.

Neither torch nor ray is imported here, so that every mistake in a file is reported in a fraction of a second.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from neo_ray.searching import BudgetConfig, ObjectiveConfig, PhasesConfig, SamplerConfig, SchedulerConfig
from neo_ray.settings import Section, TrialConfig
from neo_ray.storage import Folder, at, is_url

HEAD_SLOTS = 850
"""Trials at a time that a cluster's head has room for: for each, Ray Train asks it for 0.001 of a resource of which it has 1 (of
`cluster.HEAD`), and would wait for that without an end."""

Placement = Literal["replicated", "sharded", "offloaded"]
Quantization = Literal["none", "8bit", "4bit"]


class TeacherConfig(Section):
    model: str
    """Hub name, local folder, or `quickstart:smollm2-135m-instruct`."""
    revision: str | None = None
    """Hub revision; pin it for a sweep that others repeat."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you read that code."""
    placement: Placement = "replicated"
    """Where the frozen weights are: whole on each worker's device; `sharded` over the devices of a trial's workers; `offloaded`:
    in host memory, likewise shared out. The latter two bring in a layer at a time. Logits are the same."""
    quantization: Quantization = "none"
    """Linear layers in fewer bits (bitsandbytes, on a GPU): 8bit is LLM.int8, 4bit is NF4 with quantised scales."""


class PruneConfig(Section):
    layers: tuple[int, ...] | None = None
    """The teacher's layers to keep, ascending, counted from 0."""
    keep: int | None = Field(None, ge=1)
    """How many layers to keep; which ones is found by greedy removal on training text."""
    calibration_tokens: int = Field(1024, ge=16)
    """Training tokens on which the greedy removal measures the loss."""

    @property
    def num_layers(self) -> int:
        """How many layers are kept."""
        return len(self.layers) if self.layers is not None else int(self.keep or 0)

    @model_validator(mode="after")
    def _one_of(self) -> PruneConfig:
        if (self.layers is None) == (self.keep is None):
            raise ValueError("give exactly one of `layers` and `keep`")
        layers = list(self.layers or ())
        if self.layers is not None and (not layers or layers != sorted(set(layers)) or layers[0] < 0):
            raise ValueError("`layers` must be ascending, distinct, not negative, and at least one")
        return self


class StudentConfig(Section):
    model: str | None = None
    """Hub name or local folder."""
    prune: PruneConfig | None = None
    """Make the student from the teacher by dropping layers."""
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Quantization = "none"
    """As of the teacher, under an adapter (4bit: QLoRA). An export merges into the plain weights, and says what that changes."""

    @model_validator(mode="after")
    def _one_of(self) -> StudentConfig:
        if (self.model is None) == (self.prune is None):
            raise ValueError("give exactly one of `model` and `prune`")
        return self


class DataConfig(Section):
    source: str
    """A JSONL, Parquet, CSV or text file, a folder of them, a hub name, or `quickstart:owt`."""
    subset: str | None = None
    """Hub configuration name (`0625` of Infinity-Instruct)."""
    split: str = "train"
    """Hub split that the three splits are cut from."""
    revision: str | None = None
    """Hub revision; pin it for a sweep that others repeat."""
    format: Literal["auto", "text", "instruction", "chat"] = "auto"
    """`auto` looks at the columns: `messages` or `conversations`; `instruction` + `response`; `text`."""
    columns: dict[str, str] = Field(default={})
    """Role → column name where the names differ, e.g. `{text: body}`; roles: text, messages, instruction, input, response."""
    max_length: int = Field(2048, ge=2)
    """Tokens an example is truncated to."""
    limit: int | None = Field(None, ge=1)
    """Use at most this many examples of the source (chosen by hash, so stable under reordering)."""
    train_limit: int | None = Field(None, ge=1)
    """At most this many training examples (a small-data regime); the other splits keep theirs."""
    select_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the examples on which trials are ranked."""
    report_fraction: float = Field(0.05, gt=0, lt=1)
    """Share that no ranking touches: for the confirm phase and the final table."""

    @model_validator(mode="after")
    def _room_for_training(self) -> DataConfig:
        if self.select_fraction + self.report_fraction >= 1:
            raise ValueError("select_fraction + report_fraction leave nothing to train on")
        return self


WHERE_IT_RUNS = (
    "runs on a machine of the cluster. There: auto, or host:port of the head (6379 as a rule); from outside: "
    "`ray job submit --address http://<head>:8265 -- python -m neo_ray.sweep …`, or `ray exec cluster.yaml '…'`"
)


def _kind_of_address(address: str) -> str:
    kinds = {"ray": "a Ray client's server", "http": "a job server", "https": "a job server"}
    return kinds.get(address.partition("://")[0], "no Ray cluster")


class ResourcesConfig(Section):
    address: str | None = None
    """Of a Ray cluster, from one of its machines: `auto`, or `host:port` of its head; null starts Ray on this machine."""
    workers_per_trial: int = Field(1, ge=1)
    """Data-parallel workers of one trial."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker; a fraction packs several trials on a GPU (one worker a trial then)."""
    cpus_per_worker: float = Field(1, gt=0)
    accelerator_type: str | None = None
    """Only nodes with this accelerator take workers, by Ray's name of it (`A100`, `L4`, …); for clusters of several kinds."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK"] = "PACK"
    """Where the workers of one trial go: together where they fit, one a node where they can, or on one node in any case."""
    concurrency: int | Literal["auto"] = "auto"
    """Trials at the same time, at most 850 (docs/scale.md); `auto` fills the cluster."""
    nodes_on_demand: bool = False
    """Nodes come as trials ask for them and only the cluster knows how many (KubeRay); needs a number as concurrency.

    A cluster of `ray up` is known by its own file."""
    memory_check: bool = True
    """Refuse trials that take more memory than there is, by the plan's estimate."""
    max_failures: int = Field(2, ge=0)
    """How often a trial whose worker died is put back, from its last checkpoint; so with a shard of stored targets."""
    silence_minutes: float = Field(30, gt=0)
    """A trial without an optimizer step, or a builder of stored targets without a token, for so long is hung: its workers are
    replaced. Loading may take four times that."""

    tflops: float | None = Field(None, gt=0)
    """TFLOP/s that a device reaches in training, for the times of `--dry-run` until trials have finished; null: 40 % of the peak
    of `accelerator_type`, where that is named."""

    @field_validator("address")
    @classmethod
    def _of_a_cluster(cls, value: str | None) -> str | None:
        if value is not None and is_url(value):
            raise ValueError(f"{value} is the address of {_kind_of_address(value)}, and a sweep's driver {WHERE_IT_RUNS}")
        return value

    @field_validator("concurrency")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1, or auto")
        return value

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourcesConfig:
        gpus = self.gpus_per_worker
        if self.nodes_on_demand and self.concurrency == "auto":
            raise ValueError("nodes_on_demand: true needs a number as `concurrency`: how many trials may run at a time")
        if gpus != int(gpus) and self.workers_per_trial > 1:
            raise ValueError(
                f"a fraction of a GPU (gpus_per_worker: {gpus}) takes one worker a trial, "
                f"not {self.workers_per_trial}: workers of one trial must sit on different devices"
            )
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_worker: {gpus} must be a whole number or below 1")
        return self


def _known(place: str) -> str:
    """A folder, or a URL of a kind that there is."""
    import fsspec

    kind = place.partition("://")[0]
    if is_url(place) and kind not in fsspec.available_protocols():
        raise ValueError(
            f"{place} is neither a folder nor the URL of an object store such as s3://bucket/path or gs://bucket/path"
        )
    return place


class TargetsConfig(Section):
    """What the teacher says, and where it comes from."""

    mode: Literal["auto", "live", "projection", "hidden", "topk"] = "auto"
    """`live` runs the teacher in every trial. Of the stored ones, made once for all sweeps, `projection` (2 bytes × the student's
    width a token) serves forward KL at one temperature through a frozen head, `hidden` (2 bytes × the teacher's width) every
    divergence; both are exact up to fp16. `auto` takes the smallest of these that serves the whole search space. `topk`
    (6 × `top_k` + 4 bytes) serves every divergence at one temperature, and is biased: divergences become lower bounds."""
    top_k: int = Field(64, ge=1)
    """Under `topk`: the teacher's likeliest tokens of a position, kept one by one; the others count as one."""
    path: str | None = None
    """Where the stores are: a folder that all nodes see, or a URL of an object store (`s3://…`), of which each node keeps a copy
    under `storage.scratch`. null: `<storage.cache>/targets`."""

    @field_validator("path")
    @classmethod
    def _a_place(cls, value: str | None) -> str | None:
        return _known(value) if value is not None else None


class StorageConfig(Section):
    path: str = "results"
    """Results go to `<path>/<name>`; on a cluster a folder that all nodes see, or a URL of an object store (`s3://…`)."""
    cache: str = "~/.cache/neo_ray"
    """Tokenised data, pruned students, downloads, the teacher's targets; shared by sweeps. On a cluster a folder that all nodes
    see, or a URL of an object store: the driver's machine makes them under `storage.scratch`, the others bring what they need."""
    scratch: str | None = None
    """A folder on each node's own disk for copies of what object stores hold; variables (`$TMPDIR/x`) are the node's. null: under
    the system's folder for temporary files."""
    study: str | None = None
    """Database URL of the Optuna study (`postgresql://host/studies`), for optuna-dashboard; null is `study.db` in the results."""

    @field_validator("study")
    @classmethod
    def _a_database(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"[a-z][a-z0-9+]*://", value):
            raise ValueError("must be a database URL, e.g. postgresql://host/studies or sqlite:////shared/study.db")
        return value

    @field_validator("path", "cache")
    @classmethod
    def _a_place(cls, value: str) -> str:
        return _known(value)


class WandbConfig(Section):
    project: str = "neo_ray"
    """Where its runs go."""
    entity: str | None = None
    """User or team; null is the account's own."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the results folder, for `wandb sync`; not where `storage.path` is an object store."""


class MlflowConfig(Section):
    tracking_uri: str | None = None
    """A server's URL, without a password in it, or `sqlite:////path/mlflow.db`; null is MLFLOW_TRACKING_URI. A folder is refused
    by MLflow 3 unless MLFLOW_ALLOW_FILE_STORE is true."""
    experiment: str | None = None
    """null is the sweep's name."""

    @field_validator("tracking_uri")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value is not None and re.match(r"[a-z][a-z0-9+]*://[^/@]*:[^/@]*@", value):
            raise ValueError("holds a password; give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment")
        return value


class LoggingConfig(Section):
    tensorboard: bool = True
    """Event files in `trials/<id>/tensorboard`: `tensorboard --logdir results/<name>/trials`."""
    wandb: WandbConfig | None = None
    """A run of Weights & Biases for each trial (the package wandb); the key is WANDB_API_KEY of the environment, or `wandb
    login`'s."""
    mlflow: MlflowConfig | None = None
    """A run of MLflow for each trial (the package mlflow)."""


class Axis(Section):
    """One axis of the search space. Exactly one of the kinds; `of` + `times` or `plus` derive a value from another axis."""

    sets: str | None = None
    """The leaf that the axis gives a value to, where its name is another one: two axes may share a leaf, under conditions."""
    grid: tuple[Any, ...] | None = None
    choice: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    int_uniform: tuple[int, int] | None = None
    quantised: tuple[float, float, float] | None = None
    """[low, high, step]"""
    of: str | None = None
    times: float = 1.0
    plus: float = 0.0
    value: Any = None
    """A fixed value."""
    when: dict[str, Any] | None = None
    """The axis exists only where other axes have these values (one, or a list of them)."""

    @model_validator(mode="before")
    @classmethod
    def _bare_value(cls, raw: Any) -> Any:
        return raw if isinstance(raw, (dict, Axis)) else {"value": raw}

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        kinds = [k for k in AXIS_KINDS if k in self.model_fields_set]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(AXIS_KINDS)}, not {kinds or 'none'}")
        kind, value = kinds[0], getattr(self, kinds[0])
        if value is None and kind != "value":
            raise ValueError(f"`{kind}` is empty")
        if kind in ("grid", "choice") and not value:
            raise ValueError(f"`{kind}` is empty")
        if kind in ("uniform", "log_uniform", "int_uniform", "quantised"):
            low, high = value[0], value[1]
            if low > high:
                raise ValueError(f"`{kind}` has low {low} > high {high}")
            if kind == "log_uniform" and low <= 0:
                raise ValueError(f"`log_uniform` takes the logarithm of its bounds, and {low} has none")
            if kind == "quantised" and value[2] <= 0:
                raise ValueError(f"`quantised` has step {value[2]}, which must be above 0")
        if kind != "of" and {"times", "plus"} & self.model_fields_set:
            raise ValueError("`times` and `plus` go with `of`")
        return self

    @property
    def kind(self) -> str:
        return next(k for k in AXIS_KINDS if k in self.model_fields_set)


AXIS_KINDS = ("grid", "choice", "uniform", "log_uniform", "int_uniform", "quantised", "of", "value")


class SweepConfig(TrialConfig):
    """A whole sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the results folder."""
    teacher: TeacherConfig | None = None
    student: StudentConfig
    data: DataConfig
    search: dict[str, Axis] = Field(default={})
    """Axis name → axis. A name is a leaf of the trial config (`rank`), its path (`lora.rank`), or a word where it `sets` one."""
    points: tuple[dict[str, Any], ...] = ()
    """Settings to try first, each axis → value; an axis that is left out has the sweep file's own value."""
    sampler: SamplerConfig = SamplerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    budget: BudgetConfig = BudgetConfig()
    phases: PhasesConfig | None = None
    """A study in phases, in place of `sampler` and `scheduler`; null: one phase, with those."""
    resources: ResourcesConfig = ResourcesConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    storage: StorageConfig = StorageConfig()
    targets: TargetsConfig = TargetsConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> SweepConfig:
        if self.student.prune is not None and self.teacher is None:
            raise ValueError("student.prune drops layers of the teacher, and there is no `teacher` section")
        if self.has_teacher and self.teacher is None:
            raise ValueError(f"method: {self.method} needs a `teacher` section (without one: lora, sft)")
        if any(objective.metric == "select_kl" for objective in self.objective.all) and self.teacher is None:
            raise ValueError("objective.metric: select_kl is measured against a teacher, and there is no `teacher` section")
        return self

    @property
    def trial(self) -> TrialConfig:
        """The trial's part, before any axis is applied."""
        return TrialConfig.model_validate({n: getattr(self, n) for n in TrialConfig.model_fields})

    @property
    def results(self) -> Folder:
        return at(self.storage.path, self.storage.scratch) / self.name

    @property
    def folder(self) -> Path:
        """Where this machine writes results: their own folder, or one that is uploaded to an object store."""
        return self.results if isinstance(self.results, Path) else self.results.here

    @property
    def shared_cache(self) -> Folder:
        return at(self.storage.cache, self.storage.scratch)

    @property
    def cache(self) -> Path:
        """Where this machine makes what is shared: the cache itself, or a folder whose contents go to an object store."""
        return self.shared_cache if isinstance(self.shared_cache, Path) else self.shared_cache.here

    @property
    def targets_folder(self) -> Folder:
        return at(self.targets.path, self.storage.scratch) if self.targets.path else self.shared_cache / "targets"
