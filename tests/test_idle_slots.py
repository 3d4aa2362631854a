"""Does a slot of several workers outlast the time-out of their collectives while no trial comes? The board answers in time."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from neo_ray import board, slot
from neo_ray.config import ResourcesConfig

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS, IDLE_SECONDS = 6.0, 15.0


class Asked:
    """The board as workers have it, whose methods end with `.remote`, in this process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.board = board.Board(0)
        self.board.nodes[0] = set()
        self.answers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            answer = asyncio.run_coroutine_threadsafe(getattr(self.board, name)(*arguments), self.loop).result()
            self.answers.append((name, answer))
            return answer

        return SimpleNamespace(remote=remote)


def _worker(rank: int, folder: Path, patience_seconds: float) -> None:
    board.Board._wait.__defaults__ = (patience_seconds,)  # type: ignore[attr-defined]
    asked = Asked()
    slot.ray = SimpleNamespace(  # type: ignore[attr-defined]
        get=lambda answer: answer,
        get_actor=lambda *_, **__: asked,
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: f"node-{rank}"),
        train=SimpleNamespace(get_context=lambda: SimpleNamespace(get_world_rank=lambda: rank)),
    )
    (folder / f"here-{rank}").touch()
    while len(list(folder.glob("here-*"))) < 2:  # one may take longer to import than the time-out is
        time.sleep(0.05)
    timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timeout)
    threading.Timer(IDLE_SECONDS, lambda: asked.close.remote()).start()
    begun = time.monotonic()
    slot.slot_loop({"job": slot.SlotJob(0, "board", None, str(folder), 60.0)})
    if rank == 0:
        assert time.monotonic() - begun >= IDLE_SECONDS - 0.5
        taken = [answer for name, answer in asked.answers if name == "take"]
        assert taken[-1] == ("closed", None) and set(taken[:-1]) == {("", None)} and len(taken) > IDLE_SECONDS / TIMEOUT_SECONDS
    dist.destroy_process_group()


def test_the_board_answers_before_a_collective_gives_up(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(tmp_path, TIMEOUT_SECONDS / 4), nprocs=2)
    for silence_minutes in (0.25, 30, 600):
        runner = slot.SlotRunner(slot.SlotJob(0, "board", None, "folder", 60 * silence_minutes), ResourcesConfig(), None, print)
        made = runner._trainer().backend_config
        assert 3 * board.PATIENCE_SECONDS <= 60 < made.timeout_s, "as Ray Train makes the group"
        assert made.timeout_s > slot.LOADING * 60 * silence_minutes, "what waits for another worker to load waits longer"


def test_a_board_that_kept_them_waiting_would_lose_the_slot(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match=r"[Tt]imed out|closed by peer"):
        mp.spawn(_worker, args=(tmp_path, 2 * IDLE_SECONDS), nprocs=2)
