"""How is somebody told of trials without anybody waiting for it? One thing after another, from a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

Job = Callable[[], str | None]
"""Sends one thing; returns why it could not, or raises."""
MOST_WAITING = 10_000
"""Beyond that the oldest is dropped: a sweep's rows of days."""
PAUSE_SECONDS = 60.0
"""After a failure nothing is tried for so long."""


class Outbox:
    """What waits to be sent, in order. What could not be sent stays, and goes with what comes after a pause, or at the end."""

    def __init__(self, name: str, failed: Callable[[str], None]) -> None:
        """`failed` is told why, once."""
        self.name, self.failed = name, failed
        self.waiting: deque[Job] = deque(maxlen=MOST_WAITING)
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.resume_at, self.said = 0.0, False

    def put(self, *jobs: Job) -> None:
        """Returns at once."""
        with self.lock:
            overflows = len(self.waiting) + len(jobs) > MOST_WAITING
            self.waiting.extend(jobs)
            if self.thread is None and time.monotonic() >= self.resume_at:
                self._start()
        if overflows:
            self.complain(f"more than {MOST_WAITING:,} messages wait")

    def flush(self, seconds: float) -> None:
        """Try once more all that waits, for so long at most."""
        with self.lock:
            if self.thread is None and self.waiting:
                self._start()
            thread = self.thread
        if thread is not None:
            thread.join(seconds)

    def complain(self, why: str) -> None:
        with self.lock:
            said, self.said = self.said, True
        if not said:
            self.failed(why)

    def _start(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True, name=self.name)
        self.thread.start()

    def _run(self) -> None:
        while True:
            with self.lock:
                if not self.waiting:
                    self.thread = None
                    return
                job = self.waiting[0]
            try:
                why = job()
            except Exception as error:  # whatever a server can do: no trial depends on it
                why = f"{type(error).__name__}: {error}"
            if why is not None:
                self.complain(why)
            with self.lock:
                if why is not None:
                    self.thread, self.resume_at = None, time.monotonic() + PAUSE_SECONDS
                    return
                if self.waiting and self.waiting[0] is job:  # else dropped meanwhile
                    self.waiting.popleft()
