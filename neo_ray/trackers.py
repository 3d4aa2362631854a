"""How does a trial become a run of Weights & Biases or MLflow? By Ray's integration of the one, and the other's client."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune.logger import LoggerCallback

from neo_ray.config import SweepConfig
from neo_ray.loggers import OURS, SECONDS_TO_SEND, shown
from neo_ray.outbox import Outbox


class Wandb(WandbLoggerCallback):
    """A run for each trial. Offline, it asks for no key, and writes into the results folder, wherever its process is."""

    def __init__(self, config: SweepConfig) -> None:
        assert config.logging.wandb is not None
        settings = config.logging.wandb
        self.offline = settings.mode == "offline"
        own: dict[str, Any] = {"entity": settings.entity, "mode": settings.mode, "dir": str(config.folder.resolve())}
        super().__init__(project=settings.project, group=config.name, excludes=OURS, **own)

    def setup(self, *args: Any, **info: Any) -> None:
        if self.offline:  # Ray goes by the environment, and would ask for a key
            os.environ["WANDB_MODE"] = "offline"
        super().setup(*args, **info)


class Mlflow(LoggerCallback):
    """A run for each trial, under its id, with the settings that were searched and its curves over optimizer steps.

    By MLflow's client alone, whose calls name their run: the fluent ones, and Ray's integration with them, may write into
    another that is active. From a thread: a server that is away delays nothing, is said once, and is told later what it missed.
    """

    def __init__(self, config: SweepConfig, say: Callable[[str], None]) -> None:
        super().__init__()
        assert config.logging.mlflow is not None
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        self.uri, self.sweep = config.logging.mlflow.tracking_uri, config.name
        self.experiment_name = config.logging.mlflow.experiment or config.name
        self.outbox = Outbox("mlflow", lambda why: say(f"MLflow takes nothing ({why}); the sweep goes on, and tries it again"))
        self.steps: dict[Any, int] = {}
        self.client: Any = None
        self.experiment: str | None = None
        self.runs: dict[str, str] = {}
        """Trial → run. As the client and the experiment, of the outbox's thread."""

    def log_trial_start(self, trial: Any) -> None:
        params = {name: str(value) for name, value in trial.config["params"].items()}
        self.outbox.put(partial(self._send, trial.config["trial"], params=params))

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        self.steps[trial] = result.get("step") or self.steps.get(trial, 0)  # the end of a trial is told without one
        row = {name: float(value) for name, value in shown(result).items() if isinstance(value, int | float)}
        told = round(1000 * time.time()), self.steps[trial]
        if row:
            self.outbox.put(partial(self._send, trial.config["trial"], metrics=[(*item, *told) for item in row.items()]))

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self.outbox.put(partial(self._send, trial.config["trial"], status="FAILED" if failed else "FINISHED"))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.outbox.flush(SECONDS_TO_SEND)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks into files that nothing reads."""
        return {}

    def _send(
        self,
        trial: str,
        params: dict[str, str] | None = None,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        status: str | None = None,
    ) -> None:
        """Raises what says that the server is away; what it refuses is said, and not tried again."""
        entities, exceptions = (importlib.import_module(f"mlflow.{name}") for name in ("entities", "exceptions"))
        try:
            run = self.runs.get(trial) or self._begin(trial)
            if params or metrics:
                given = [entities.Param(*item) for item in (params or {}).items()]
                self.client.log_batch(run, metrics=[entities.Metric(*item) for item in metrics], params=given)
            if status is not None:
                self.client.set_terminated(run, status)
        except exceptions.MlflowException as error:
            if error.get_http_status_code() >= 500:
                raise
            self.outbox.complain(f"{type(error).__name__}: {error}")

    def _begin(self, trial: str) -> str:
        """A run of its own, in the sweep's experiment."""
        self.client = self.client or importlib.import_module("mlflow").MlflowClient(self.uri)
        if self.experiment is None:
            known = self.client.get_experiment_by_name(self.experiment_name)
            self.experiment = known.experiment_id if known else self.client.create_experiment(self.experiment_name)
        run = self.client.create_run(self.experiment, run_name=trial, tags={"sweep": self.sweep, "trial_name": trial})
        self.runs[trial] = str(run.info.run_id)
        return self.runs[trial]


PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Of MLflow's client with a server, unless the environment has it otherwise: its own are 7, and 120 s for each."""
