"""Does every command end in the same words and codes? The one place where what was raised becomes an exit code."""

from __future__ import annotations

import errno
import sys

import pytest

from neo_ray import door
from neo_ray.settings import ConfigError


class Missed(Exception):
    pass


FULL = OSError(errno.ENOSPC, "No space left on device", "/results/journal.jsonl")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("training.steps: -1;\n allowed: more"), 2, "error: training.steps: -1; allowed: more\n"),
        (Missed("other scores"), 1, "error: other scores\n"),
        (FULL, 2, "error: /results/journal.jsonl: No space left on device\n"),
        (ConnectionError("no Ray there"), 2, "error: no Ray there\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here\n"),
    ],
)
def test_what_is_raised_is_one_line_and_a_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with door.end(failures=(Missed,)) as end:
        raise error
    assert end.code == code
    assert capsys.readouterr().err == said


LOST = BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_reader_that_went_away_is_no_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def left() -> None:
        raise LOST

    with monkeypatch.context() as patch, door.end() as end:
        patch.setattr(sys.stderr, "close", lambda: None)
        patch.setattr(sys.stdout, "flush", left)
        raise LOST
    assert end.code == 0 and capsys.readouterr().err == ""


def test_any_other_broken_pipe_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with door.end(out_of_reach=1) as end:
        raise LOST
    assert end.code == 1 and capsys.readouterr().err == "error: Broken pipe\n"


def test_a_command_may_say_how_it_ends() -> None:
    with door.end(out_of_reach=1) as end:
        end.code = 7
    assert end.code == 7
    with door.end(out_of_reach=1) as end:
        raise FULL
    assert end.code == 1


@pytest.mark.parametrize("error", [ValueError("a fault of the program's"), Missed()])
def test_any_other_error_is_seen_whole(error: Exception) -> None:
    with pytest.raises(type(error)), door.end():
        raise error
