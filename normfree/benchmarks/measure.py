"""Times side by side, and what a training step keeps in memory."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

ALLOCATORS = {
    "default": "",
    # glibc keeps what is freed, which takes page faults out of a comparison.
    "tuned": "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184",
}


@dataclass(frozen=True)
class Ratio:
    """Of our time to a peer's, over rounds in which both ran."""

    peer: str
    ours_s: float
    peer_s: float
    ratio: float  # median of the rounds' ratios
    low: float  # quartiles
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        return (self.high - self.low) / self.ratio

    def to_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


def compare(
    steps: Mapping[str, Callable[[], object]],
    ours: str,
    *,
    rounds: int = 9,
    spread: float = 0.06,
    most_rounds: int = 45,
    advance: Callable[[], None] = lambda: None,
) -> list[Ratio]:
    """Run all steps in turn, round after round, and give the ratio of `steps[ours]` to every other one.

    At least `rounds`, and on until the interquartile range of each ratio is below `spread` of it, or `most_rounds`.
    The first round is not counted. `advance` is called after every round.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    ratios: list[Ratio] = []
    for round_number in range(most_rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
        if round_number == 0:
            times = {name: [] for name in steps}
            continue
        advance()
        if round_number >= rounds:
            ratios = [_ratio(peer, times[ours], times[peer]) for peer in steps if peer != ours]
            if all(ratio.spread < spread for ratio in ratios):
                break
    return ratios


def _ratio(peer: str, ours: list[float], theirs: list[float]) -> Ratio:
    low, median, high = statistics.quantiles((a / b for a, b in zip(ours, theirs, strict=True)), n=4)
    return Ratio(peer, statistics.median(ours), statistics.median(theirs), median, low, high, len(ours))


class _Storages(TorchDispatchMode):
    """Remembers, without holding them, the storages of everything that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.seen[value.untyped_storage()] = None
        return out


def kept_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes that a forward pass leaves for its backward pass, beyond parameters, buffers and inputs.

    They are those of the storages that are still alive when the forward pass has ended, whoever holds them.
    """
    with _Storages() as storages:
        out = model(*inputs)
    before = {t.untyped_storage()._cdata for t in (*inputs, *model.parameters(), *model.buffers())}
    total = sum(storage.nbytes() for storage in storages.seen if storage._cdata not in before)
    del out
    return total


def in_process(module: str, setting: Mapping[str, Any], allocator: str) -> Iterator[dict[str, Any]]:
    """Run `python -m module '<setting as JSON>'` under an allocator setting: the JSON objects that it prints, by line.

    Raises RuntimeError with the end of its error output if it fails.
    """
    environment = os.environ | {"GLIBC_TUNABLES": ALLOCATORS[allocator]}
    command = [sys.executable, "-m", module, json.dumps(dict(setting))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            yield json.loads(line)
        errors = process.stderr.read()
    if process.returncode:
        raise RuntimeError(f"{module} failed: {errors[-2000:]}")


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("timm", "torchvision"):
        module = sys.modules.get(package) or __import__(package)
        versions[package] = module.__version__
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
