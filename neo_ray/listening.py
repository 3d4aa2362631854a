"""How does a worker hear that its trial is to stop, and who sees that the trial hangs?"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray

from neo_ray.records import Stop

LOADING = 4  # times the silence that is a hang among steps: weights of a large model come over a network


class Listener:
    """Listens to the board in the background, so that the training loop only looks at a flag; and sees that it looks at all."""

    def __init__(self, board: Any, job: Any, trial_id: str, watching: bool) -> None:
        self.board, self.job, self.trial_id = board, job, trial_id
        self.asked, self.closed, self.loading = Stop.NO, False, True
        self.looked = time.monotonic()
        for watch in (self._listen, self._guard) if watching else ():
            threading.Thread(target=watch, daemon=True).start()

    def loaded(self) -> None:
        """The models are there: from now on steps are waited for."""
        self.looked, self.loading = time.monotonic(), False

    def look(self) -> Stop:
        """Is the trial to stop? The training loop asks between steps, on rank 0: that is its sign of life."""
        self.looked = time.monotonic()
        return self.asked

    def close(self) -> None:
        """The threads end by themselves: one once the board knows that the trial left its slot."""
        self.closed = True

    def _listen(self) -> None:
        while not self.closed and not self.asked:
            try:
                self.asked = ray.get(self.board.when_stopped.remote(self.trial_id))
            except ray.exceptions.RayError:  # out of reach for a while
                time.sleep(1)

    def _guard(self) -> None:
        """A trial that hangs (a collective that never returns) ends its worker: a new one takes it on from its checkpoint."""
        while not self.closed:
            time.sleep(min(5.0, self.job.silence_seconds / 4))
            loading = self.loading
            limit = self.job.silence_seconds * (LOADING if loading else 1)
            if not self.closed and time.monotonic() - self.looked > limit:
                missed = "the models are not loaded after" if loading else "no step for"
                logging.getLogger("neo_ray").error("trial %s: %s %g s", self.trial_id, missed, limit)
                if loading:  # no fault of the trial
                    ray.get(self.board.give_back.remote(self.job.slot, self.trial_id))
                else:
                    ray.get(self.board.hang.remote(self.job.slot))
                os._exit(1)
