"""Failures of a command: one sentence, and the exit code."""

import os
import re
import sys
import tempfile
import traceback

from normfree.errors import ChartError, SignalError, TrainingError

_FORESEEN = (ChartError, SignalError, TrainingError, ValueError, TypeError, ImportError, OSError)
_OF_MEMORY = (
    "not enough memory",
    "out of memory",
    "allocate memory",
    "bad_alloc",
    "bad allocation",
    "size calculation",
)


def report(error: Exception) -> int:
    """Say on standard error what went wrong, and return the exit code: 2 for what the user can mend, else 1.

    The traceback of what nobody foresaw goes to a file that the sentence names.
    """
    if _is_out_of_memory(error):
        asked = re.search(r"tried to allocate (\d[\d.]* ?\w*)", str(error))
        words = f"not enough memory{f' ({asked[1]} were asked for)' if asked else ''}: take fewer or smaller images"
    elif isinstance(error, _FORESEEN):
        words = _sentence(error)
    else:
        words = f"unexpected {type(error).__name__}: {_sentence(error)} ({_keep_traceback(error)})"
        say(words)
        return 1
    say(words)
    return 2


def say(words: str) -> None:
    """Print one sentence on standard error, if there is such a thing."""
    if sys.stderr is not None:
        print(f"normfree: {words}", file=sys.stderr)


def release_output() -> None:
    """Bring what was printed out, or let go of an output that does not take it, which would fail again at the end."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory was wanting, for this error or for what it was raised from."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OF_MEMORY):
        return True
    return error.__cause__ is not None and _is_out_of_memory(error.__cause__)


def _keep_traceback(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="normfree_", suffix=".txt", encoding="utf-8", delete=False
        ) as file:
            file.write(text)
    except OSError:
        print(text, file=sys.stderr)
        return "its traceback is above"
    return f"its traceback is in {file.name}: please report it"
