"""Who else follows a sweep's trials? TensorBoard, Weights & Biases and MLflow.

A trial is one run in each, under its id. What they show is a copy: the journal is the truth, and nothing is read back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ray import tune
from ray.tune.logger import TBXLoggerCallback
from ray.tune.result import TIMESTEPS_TOTAL

from neo_ray import uploads
from neo_ray.config import SweepConfig
from neo_ray.outbox import Outbox


class TensorBoard(TBXLoggerCallback):
    """Event files in `trials/<id>/tensorboard`, over optimizer steps; a trial that goes on has another file there.

    An object store gets them in the background, once a trial ends: what it does not take stays here, and goes with the next.
    """

    def __init__(self, config: SweepConfig, say: Callable[[str], None] = print) -> None:
        super().__init__()
        self.config = config
        self.steps: dict[Any, int] = {}

        def failed(why: str) -> None:
            say(f"TensorBoard's files cannot be uploaded ({why}); the sweep goes on, and tries it again with later ones")

        self.outbox = Outbox("tensorboard", failed)

    def log_trial_start(self, trial: Any) -> None:
        if trial in self._trial_writer:
            self._trial_writer[trial].close()
        folder = self.config.folder / "trials" / trial.config["trial"] / "tensorboard"
        self._trial_writer[trial] = self._summary_writer_cls(str(folder), flush_secs=30, filename_suffix=f".{time.time_ns()}")
        self._trial_result[trial] = {}

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        row = shown(result)
        self.steps[trial] = result.get("step") or self.steps.get(trial, 0)  # the end of a trial is told without one
        if row and self.steps[trial]:
            super().log_trial_result(iteration, trial, {**row, TIMESTEPS_TOTAL: self.steps[trial]})

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        super().log_trial_end(trial, failed)
        name = f"trials/{trial.config['trial']}/tensorboard"
        files = sorted((self.config.folder / name).glob("events.*"))
        self.outbox.put(*(partial(uploads.try_to_publish, self.config.results, f"{name}/{file.name}") for file in files))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.outbox.flush(SECONDS_TO_SEND)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks into files that nothing reads."""
        return {}


SECONDS_TO_SEND = 30.0  # at the end
SHOWN = (
    "select_",
    "report_",
    "train_",
    "suite",
    "learning_rate",
    "tokens",
    "peak_memory_bytes",
    "seconds",
    "accelerator_seconds",
)
"""What a trial's curves are of."""
OURS = ["board", "config"]
"""What a Tune trial is told beside its parameters: nothing that is searched."""


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """Of a Tune result, what a curve is drawn of."""
    return {name: value for name, value in result.items() if name.startswith(SHOWN) and value is not None}


def loggers(config: SweepConfig, say: Callable[[str], None] = print) -> list[tune.Callback]:
    """Those that a sweep file asks for. Secrets come from the environment alone: WANDB_API_KEY, MLFLOW_TRACKING_TOKEN."""
    found: list[tune.Callback] = []
    wandb, mlflow = config.logging.wandb, config.logging.mlflow
    if config.logging.tensorboard:
        found.append(TensorBoard(config, say))
    if wandb is not None:
        from neo_ray.trackers import Wandb

        found.append(Wandb(config))
    if mlflow is not None:
        from neo_ray.trackers import Mlflow

        found.append(Mlflow(config, say))
    return found
