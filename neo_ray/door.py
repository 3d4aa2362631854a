"""How does a command end? With an exit code, and with one line where the fault is not the program's."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from neo_ray.settings import ConfigError

DONE, FAILED, MISTAKEN, INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT
GOES_ON = "interrupted; the same command goes on from here"


@dataclass
class End:
    code: int = DONE


@contextmanager
def end(failures: tuple[type[Exception], ...] = (), interrupted: str = GOES_ON, out_of_reach: int = MISTAKEN) -> Iterator[End]:
    """What is done within it ends with the `code` that is set there, or with that of what was raised; other errors pass.

    Args:
        failures: what was asked for cannot be had: code 1.
        interrupted: what is said of Ctrl-C.
        out_of_reach: the code where a file or a service fails, as on a full disk.
    """
    found = End()
    try:
        yield found
    except ConfigError as error:
        found.code = _said(error, MISTAKEN)
    except failures as error:
        found.code = _said(error, FAILED)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            sys.stderr.close()
            return
        logging.getLogger("neo_ray").info("the command ends here", exc_info=True)  # where there is a log
        where = f"{error.filename}: " if error.filename else ""
        found.code = _said(f"{where}{error.strerror or error}", out_of_reach)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        found.code = INTERRUPTED


def _reader_left() -> bool:
    """Is it standard output that nobody reads any more, as of `… | head`? A broken pipe may be any other."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _said(text: object, code: int) -> int:
    print(f"error: {' '.join(str(text).split())}", file=sys.stderr)
    return code
