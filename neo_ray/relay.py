"""What stands for a trial in Ray Tune? A relay: it hands the trial to the board, and tells Tune what comes back.

There is a process of it on the head for each trial that runs: it imports neither torch nor what stands on it.
"""

from __future__ import annotations

import json
from typing import Any

import ray
from ray import tune

from neo_ray.board import NAMESPACE, Item, kind_of
from neo_ray.records import COSTS
from neo_ray.settings import TrialConfig


class Relay(tune.Trainable):
    """A Tune trial: hands its config to the board and reports what comes back. Holds no model and takes no worker's CPU."""

    def setup(self, config: dict[str, Any]) -> None:
        self.board = ray.get_actor(config["board"], namespace=NAMESPACE)
        self.trial = config["trial"]
        job = json.loads(config["config"])
        kind = kind_of(TrialConfig.model_validate(job))
        told: list[Item] = ray.get(self.board.submit.remote(self.trial, {"config": job, "kind": kind}))
        self.seen = len(told)
        self.last: dict[str, Any] = next((item["row"] for item in reversed(told) if item["kind"] == "report"), {})

    def step(self) -> dict[str, Any]:
        """The next evaluation, or the end. Tune asks for it once it has taken what was before."""
        while True:
            items: list[Item] = ray.get(self.board.items_after.remote(self.trial, self.seen))
            for item in items:
                self.seen += 1
                if item["kind"] == "report":
                    self.last = item["row"]
                    return dict(item["row"])
                if item["kind"] == "end":
                    last = {**self.last, **(item.get("metrics") or {})} if item["state"] == "COMPLETE" else {}
                    last = {**last, **{name: item[name] for name in COSTS if item.get(name) is not None}}
                    return {**last, "state": item["state"], "cause": item.get("cause"), "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None
