"""A function in a process of its own, which may hang, crash or take all memory without harm."""

import os
import pickle
import resource
import select
import signal
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

MEMORY = 2 * 2**30
"""Bytes that a trial may take more than this process; MemoryError beyond."""


class Outcome(NamedTuple):
    """End of a trial: what it returned or raised, or how else it ended."""

    end: str  # "returned", "raised", "hung" or "crashed"
    value: Any = None
    error: str = ""  # the class of what was raised, with its bases
    words: str = ""
    seconds: float = 0.0

    def is_a(self, *names: str) -> bool:
        """Tell whether an error of one of these classes was raised."""
        return self.end == "raised" and bool(set(names) & set(self.error.split()))


def run_in_child(function, limit=60.0):
    """Call a function in a fork of this process; its value must be picklable."""
    receiving, sending = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _answer(function, sending)
    os.close(sending)
    answer = b""
    while True:
        left = start + limit - time.monotonic()
        if left <= 0 or not select.select([receiving], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(receiving)
            return Outcome("hung", words=f"after {limit:g} s", seconds=limit)
        part = os.read(receiving, 2**20)
        if not part:
            break
        answer += part
    os.close(receiving)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - start
    if not answer:
        return Outcome("crashed", words=f"wait status {status}", seconds=seconds)
    return pickle.loads(answer)._replace(seconds=seconds)


def _answer(function, sending):
    """Answer from within the child, which ends here."""
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        warnings.simplefilter("ignore")
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        outcome = Outcome("returned", function())
    except BaseException as error:
        names = " ".join(kind.__name__ for kind in type(error).__mro__)
        outcome = Outcome("raised", error=names, words=f"{type(error).__name__}: {error}")
    try:
        with os.fdopen(sending, "wb") as pipe:
            pickle.dump(outcome, pipe)
    finally:
        os._exit(0)


def summary_of(value):
    """Summarize values so that equal summaries are of equal values: tensors and arrays by their bytes."""
    import dataclasses
    import hashlib

    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return tuple((str(key), summary_of(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(summary_of, value))
    return repr(value)
