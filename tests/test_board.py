"""Does a trial get a slot again when it should, and only then? The board alone, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from neo_ray.board import MAX_PASSED_OVER, MAX_PREEMPTIONS, Board
from neo_ray.records import Stop, failures

CONFIG = {"training": {"micro_batch_size": "auto"}}


def on_a_board(story: Callable[[Board], Awaitable[None]], max_failures: int = 1) -> None:
    async def told() -> None:
        board = Board(max_failures)
        await board.submit("0000", {"config": CONFIG})
        await board.submit("0001", {"config": CONFIG})
        await asyncio.wait_for(story(board), 10)

    asyncio.run(told())


def kinds(board: Board, trial: str) -> list[Any]:
    return [item["kind"] for item in board.items[trial]]


def test_a_trial_without_memory_comes_back_first_with_half_the_micro_batch() -> None:
    async def story(board: Board) -> None:
        assert (await board.take(0))[0] == "0000"
        for size, half in ((5, 3), (3, 2), (2, 1)):
            await board.using("0000", size)
            await board.retry_smaller(0, "0000", "no memory")
            await board.retry_smaller(0, "0000", "the other rank says so, too")
            trial, job = await board.take(0)
            assert trial == "0000" and job is not None and job["micro_batch_size"] == half
        assert kinds(board, "0000") == ["attempt"] * 3
        assert "micro-batch of 5 halved: no memory" in board.items["0000"][0]["message"]

    on_a_board(story)


def test_a_worker_that_died_for_want_of_memory_halves_and_counts_as_no_failure() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        await board.using("0000", 2)
        await board.slot_lost(0, "killed", "out_of_memory")
        trial, job = await board.take(0)
        assert trial == "0000" and job is not None and job["micro_batch_size"] == 1 and not board.failures
        for _ in range(2):  # with a micro-batch of 1 there is nothing to halve: failures count
            await board.using("0000", 1)
            await board.slot_lost(0, "killed", "out_of_memory")
            await board.take(0)
        end = board.items["0000"][-1]
        assert (end["kind"], end["state"], end["cause"]) == ("end", "FAILED", "out_of_memory")

    on_a_board(story)


def test_a_lost_slot_returns_its_trial_a_bounded_number_of_times() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        assert await board.slot_lost(0, "node died", "error") == ("0000", 0)
        assert (await board.take(1))[0] == "0000", "it goes on before the others"
        assert await board.slot_lost(0, "again", "error") == (None, 0), "the slot that lost it holds nothing"
        await board.slot_lost(1, "node died", "error")
        assert board.items["0000"][-1]["state"] == "FAILED"
        assert "died 2 times; the last time: node died" in board.items["0000"][-1]["error"]
        assert (await board.take(1))[0] == "0001"

    on_a_board(story)


def test_failures_under_an_earlier_driver_count() -> None:
    events = [{"event": "attempt", "trial": "0000", "cause": cause} for cause in ("error", "preempted", "storage", "hung", None)]
    again = [{"event": "end", "trial": "0001"}, {"event": "attempt", "trial": "0001"}]
    before = failures([*events, {"event": "attempt", "trial": "0001", "cause": "error"}, *again])
    assert before == {"0000": 2}, "one that is run again once it had FAILED begins anew"

    async def told() -> None:
        board = Board(2, before)
        await board.submit("0000", {"config": CONFIG})
        await board.take(0)
        await board.slot_lost(0, "SIGSEGV", "error")
        assert "died 3 times" in board.items["0000"][-1]["error"]

    asyncio.run(told())


def test_a_trial_that_storage_failed_goes_to_the_end_of_the_queue_and_is_not_to_blame_while_none_comes_through() -> None:
    async def story(board: Board) -> None:
        for number in range(12):
            trial = (await board.take(0))[0]
            assert trial == f"{number % 2:04d}", "in turn"
            await board.set_back(0, trial, "No space left on device")
            await board.set_back(0, trial, "the other rank says so, too")
            assert await board.slot_lost(0, "x", "error") == (None, 0)
        lost = [item["cause"] for item in board.log if item["kind"] == "attempt"]
        assert not any(board.failures.values()) and lost == ["storage"] * 12

    on_a_board(story)


def test_a_trial_that_storage_fails_while_others_come_through_is_given_up() -> None:
    async def story(board: Board) -> None:
        for number in range(2, 5):
            assert (await board.take(0))[0] == "0000"
            await board.set_back(0, "0000", "File too large")
            other = (await board.take(0))[0]
            await board.submit(f"{number:04d}", {"config": CONFIG})
            board.queue.rotate(1 if board.queue[0] != "0000" else 0)
            await board.finish(0, other, {"state": "COMPLETE"})
        end = board.items["0000"][-1]
        assert (end["kind"], end["state"], end["cause"]) == ("end", "FAILED", "storage") and "File too large" in end["error"]

    on_a_board(story)


def test_a_trial_that_is_submitted_again_runs_once_and_keeps_what_it_said() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        await board.report("0000", {"rung": 1})
        await board.submit("0000", {"config": CONFIG})
        assert list(board.queue) == ["0001"] and kinds(board, "0000") == ["report"]
        await board.finish(0, "0000", {"state": "COMPLETE"})
        await board.submit("0000", {"config": CONFIG})
        assert list(board.queue) == ["0001"] and [i["kind"] for i in await board.items_after("0000", 0)] == ["report", "end"]

    on_a_board(story)


def test_an_end_counts_once_and_only_from_the_slot_that_holds_the_trial() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        await board.finish(0, "0000", {"state": "FAILED"})
        await board.finish(0, "0000", {"state": "FAILED"})
        await board.finish(1, "0001", {"state": "COMPLETE"})
        assert kinds(board, "0000") == ["end"] and kinds(board, "0001") == []

    on_a_board(story)


def test_a_stop_wakes_the_slot_at_once_and_a_stopped_trial_in_the_queue_needs_no_slot() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        listening = asyncio.create_task(board.when_stopped("0000"))
        await asyncio.sleep(0.01)
        assert not listening.done()
        await board.cancel("0000")
        assert kinds(board, "0000") == ["stop"], "the decision is in the log before the slot has seen it"
        assert await asyncio.wait_for(listening, 1) == Stop.PRUNED
        await board.finish(0, "0000", {"state": "PRUNED"})
        assert 0 <= board.items["0000"][-1]["details"]["stop_seconds"] < 60
        assert await board.when_stopped("0000") == Stop.PRUNED, "asked again, it is still so"
        await board.cancel("0001")
        await board.close()
        assert await board.take(0) == ("closed", None)
        assert board.items["0001"][-1]["state"] == "PRUNED"

    on_a_board(story)


def test_a_listener_is_let_go_when_its_trial_ends() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        listening = asyncio.create_task(board.when_stopped("0000"))
        await asyncio.sleep(0.01)
        await board.finish(0, "0000", {"state": "COMPLETE"})
        assert not await asyncio.wait_for(listening, 1)

    on_a_board(story)


def test_a_call_that_dead_workers_left_behind_keeps_no_trial() -> None:
    async def story(board: Board) -> None:
        assert (await board.take(0))[0] == "0000", "taken by nobody: the workers are dead"
        assert (await board.take(0))[0] == "0000", "by those that came after them"
        assert (await board.take(1))[0] == "0001"

    on_a_board(story)


def test_a_relay_that_follows_one_that_died_goes_on_where_tune_is() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        for rung in (1, 2):
            await board.report("0000", {"rung": rung})
        assert [item["row"]["rung"] for item in await board.items_after("0000", 0)] == [1, 2]
        await board.items_after("0000", 1)
        told = await board.submit("0000", {"config": CONFIG})
        assert [item["row"]["rung"] for item in told] == [1], "the second was fetched, and nobody knows whether Tune took it"
        assert [item["row"]["rung"] for item in await board.items_after("0000", len(told))] == [2]
        assert await board.submit("0001", {"config": CONFIG}) == [] and board.in_slot == {0: "0000"}

    on_a_board(story)


def test_an_evaluation_that_a_resumed_trial_reports_again_is_no_other() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        await board.report("0000", {"rung": 1, "select_ce": 4.0})
        await board.slot_lost(0, "node died", "error")
        await board.take(1)
        for rung in (1, 2):
            await board.report("0000", {"rung": rung, "select_ce": 4.0})
        rows = [item["row"]["rung"] for item in board.items["0000"] if item["kind"] == "report"]
        assert rows == [1, 2] and [item["row"]["rung"] for item in board.log if item["kind"] == "report"] == rows

    on_a_board(story)


def test_the_log_says_which_slot_took_a_trial_and_the_trial_s_own_items_do_not() -> None:
    async def story(board: Board) -> None:
        for slot in (4, 7):
            await board.take(slot)
        assert [(item["kind"], item["trial"], item["slot"]) for item in board.log] == [("taken", "0000", 4), ("taken", "0001", 7)]
        assert kinds(board, "0000") == [], "a relay has nothing to tell Tune"

    on_a_board(story)


def test_a_trial_that_tune_gave_up_goes_on_in_its_slot_and_one_that_never_asked_for_one_has_failed() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        await board.orphan("0000", "its relay died")
        assert not await asyncio.wait_for(_soon(board.when_stopped("0000")), 1), "the slot hears of nothing"
        await board.finish(0, "0000", {"state": "COMPLETE"})
        assert kinds(board, "0000") == ["end"] and board.items["0000"][-1]["state"] == "COMPLETE"
        await board.orphan("0007", "its relay died")
        end = board.log[-1]
        assert (end["trial"], end["state"], end["cause"], end["error"]) == ("0007", "FAILED", "error", "its relay died")

    on_a_board(story)


async def _soon(question: Awaitable[Any]) -> Any:
    """The answer within a moment; None where there is none yet."""
    try:
        return await asyncio.wait_for(question, 0.05)
    except TimeoutError:
        return None


def test_an_interrupted_sweep_ends_no_trial_and_begins_none() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        listening = asyncio.create_task(board.when_stopped("0000"))
        await asyncio.sleep(0.01)
        await board.close()
        assert await asyncio.wait_for(listening, 1) == Stop.INTERRUPTED
        await board.leave(0, "0000")
        assert await board.when_stopped("0000") == Stop.NO, "it left its slot"
        assert await board.take(0) == ("closed", None), "though another waits"
        assert kinds(board, "0000") == kinds(board, "0001") == []

    on_a_board(story)


def test_the_board_knows_which_slots_ever_asked() -> None:
    async def story(board: Board) -> None:
        await board.take(3)
        assert await board.close() == {3}

    on_a_board(story)


def test_a_hang_is_the_cause_that_is_recorded() -> None:
    async def story(board: Board) -> None:
        for _ in range(2):
            await board.take(0)
            await board.hang(0)
            await board.slot_lost(0, "worker exited", "error")
        assert board.items["0000"][-1]["cause"] == "hung"

    on_a_board(story)


def test_a_slot_whose_models_do_not_load_gives_its_trial_back_unharmed() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        await board.give_back(0, "0000")
        assert await board.slot_lost(0, "no weights", "error") == (None, 0)
        assert not board.items["0000"] and not board.failures
        assert (await board.take(1))[0] == "0000"

    on_a_board(story)


def test_a_node_that_left_counts_as_no_failure_of_its_trial() -> None:
    async def story(board: Board) -> None:
        for _ in range(5):
            assert (await board.take(0))[0] == "0000"
            await board.slot_lost(0, "its node is gone", "preempted")
        assert kinds(board, "0000") == ["attempt"] * 5 and not board.failures
        assert {item["cause"] for item in board.items["0000"]} == {"preempted"}
        board.preemptions["0000"] = MAX_PREEMPTIONS
        await board.take(0)
        await board.slot_lost(0, "its node is gone", "preempted")
        end = board.items["0000"][-1]
        assert (end["kind"], end["state"], end["cause"]) == ("end", "FAILED", "preempted")

    on_a_board(story)


def test_a_drained_slot_puts_its_trial_away_at_once_and_takes_no_other() -> None:
    async def story(board: Board) -> None:
        await board.begin(0)
        await board.joined(0, "node")
        assert await board.state() == (2, {0: {"node"}})
        await board.take(0)
        listening = asyncio.create_task(board.when_stopped("0000"))
        await asyncio.sleep(0.01)
        await board.let_go(0, "drained")
        assert await asyncio.wait_for(listening, 1) == Stop.INTERRUPTED
        await board.leave(0, "0000")
        assert await board.take(0) == ("closed", None) and await board.why_left(0) == "drained"
        assert board.items["0000"][-1]["cause"] == "preempted"
        assert (await board.take(1))[0] == "0000", "it goes on elsewhere, first of all"

    on_a_board(story)


def test_a_recycled_slot_ends_after_its_trial_and_may_begin_again() -> None:
    async def story(board: Board) -> None:
        await board.take(0)
        await board.let_go(0, "recycled")
        assert await board.when_stopped("nobody") == Stop.NO
        assert board._may_stay("0000"), "the trial runs to its end"
        await board.finish(0, "0000", {"state": "COMPLETE"})
        assert await board.take(0) == ("closed", None)
        await board.begin(0)
        assert (await board.take(0))[0] == "0001"
        assert await board.why_left(0) is None

    on_a_board(story)


def test_a_slot_takes_trials_that_its_models_serve_before_others_a_bounded_number_of_times() -> None:
    async def story(board: Board) -> None:
        for number in range(2, 2 + 2 * MAX_PASSED_OVER):
            await board.submit(f"{number:04d}", {"config": CONFIG, "kind": "full"})
        assert (await board.take(0, "adapter"))[0] == "0000", "none of its kind waits: the first"
        taken = []
        for _ in range(MAX_PASSED_OVER + 1):
            taken.append((await board.take(1, "full"))[0])
            await board.finish(1, taken[-1], {"state": "COMPLETE", "details": {"x": 1}})
        assert taken == [f"{n:04d}" for n in range(2, 2 + MAX_PASSED_OVER)] + ["0001"]
        assert board.items["0002"][-1]["details"]["waited_seconds"] >= 0

    on_a_board(story)


WAKES: dict[str, tuple[Callable[[Board], Awaitable[object]], Callable[[Board], Awaitable[object]]]] = {
    "a report, its relay": (lambda b: b.items_after("a", 0), lambda b: b.report("a", {"rung": 1})),
    "a report, the driver": (lambda b: b.log_after(1, 60.0), lambda b: b.report("a", {"rung": 1})),
    "the scheduler's stop, its worker": (lambda b: b.when_stopped("a"), lambda b: b.cancel("a")),
    "its end, its relay": (lambda b: b.items_after("a", 0), lambda b: b.finish(0, "a", {"state": "COMPLETE"})),
    "its end, its worker": (lambda b: b.when_stopped("a"), lambda b: b.finish(0, "a", {"state": "COMPLETE"})),
    "its slot's end, its worker": (lambda b: b.when_stopped("a"), lambda b: b.slot_lost(0, "died", "error")),
    "its slot's end, an idle slot": (lambda b: b.take(1), lambda b: b.slot_lost(0, "died", "error")),
    "a node that leaves, its worker": (lambda b: b.when_stopped("a"), lambda b: b.let_go(0, "drained")),
    "a node that leaves, an idle slot": (lambda b: b.take(1), lambda b: b.let_go(1, "drained")),
    "a trial, an idle slot": (lambda b: b.take(1), lambda b: b.submit("b", {})),
    "a trial taken again, its first worker": (lambda b: b.when_stopped("a"), lambda b: b.give_back(0, "a")),
    "a trial that was given up, its relay": (lambda b: b.items_after("c", 0), lambda b: b.orphan("c", "why")),
    "the end of the sweep, a worker": (lambda b: b.when_stopped("a"), lambda b: b.close()),
    "the end of the sweep, an idle slot": (lambda b: b.take(1), lambda b: b.close()),
}


@pytest.mark.parametrize("what", WAKES)
def test_who_waits_for_something_hears_of_it_at_once(what: str) -> None:
    """Within 5 s; who is not told waits for `PATIENCE_SECONDS`."""
    waits, happens = WAKES[what]

    async def told() -> None:
        board = Board(max_failures=2)
        await board.submit("a", {})
        assert (await board.take(0))[0] == "a"
        waiting = asyncio.ensure_future(waits(board))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await happens(board)
        await asyncio.wait_for(waiting, 5)

    asyncio.run(told())
