"""Measurements: times side by side, and what a training step keeps in memory."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from normfree import _torch
from normfree.benchmarks.peers import open_and_steady
from normfree.conversion import convert
from normfree.nn import recompute_weights
from normfree.sources import model_factory

ALLOCATORS = {
    "default": "",
    # glibc keeps what is freed, which takes page faults out of a comparison.
    "tuned": "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184",
    # It gives back at once what is freed, so that resident memory is what is in use.
    "returning": "glibc.malloc.mmap_threshold=65536",
}


@dataclass(frozen=True)
class Ratio:
    """Ratio of our time to a peer's, over rounds in which both ran."""

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


def interleave(
    steps: Mapping[str, Callable[[], object]],
    ours: str,
    *,
    rounds: int = 9,
    spread: float = 0.06,
    most_rounds: int = 15,
) -> dict[str, list[float]]:
    """Run all steps in turn, round after round, and give the seconds of each.

    At least `rounds`, and on until the interquartile range of the ratio of `steps[ours]` to every other one is below
    `spread` of it, or `most_rounds`. The first round is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(max(rounds, most_rounds) + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
        if round_number == 0:
            times = {name: [] for name in steps}
            continue
        if round_number >= rounds and all(ratio.spread < spread for ratio in ratios([times], ours)):
            break
    return times


def ratios(runs: Sequence[Mapping[str, list[float]]], ours: str) -> list[Ratio]:
    """Compare ours with every other one, over the rounds of several runs together."""
    times = {name: [seconds for run in runs for seconds in run[name]] for name in runs[0]}
    return [_ratio(peer, times[ours], times[peer]) for peer in times if peer != ours]


def _ratio(peer: str, ours: list[float], theirs: list[float]) -> Ratio:
    low, median, high = statistics.quantiles((a / b for a, b in zip(ours, theirs, strict=True)), n=4)
    return Ratio(peer, statistics.median(ours), statistics.median(theirs), median, low, high, len(ours))


class _Storages(_torch.TorchDispatchMode):
    """Remembers, without holding them, the storages of everything that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in _torch.leaves(out):
            if isinstance(value, Tensor):
                self.seen[value.untyped_storage()] = None
        return out


def kept_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Count the bytes that a forward pass leaves for its backward pass, beyond parameters, buffers and inputs.

    They are those of the storages that are still alive when the forward pass has ended, whoever holds them.
    """
    with _Storages() as storages:
        out = model(*inputs)
    before = {_torch.storage_key(t) for t in (*inputs, *model.parameters(), *model.buffers())}
    total = sum(storage.nbytes() for storage in storages.seen if _torch.storage_number(storage) not in before)
    del out
    return total


@dataclass(frozen=True)
class Setting:
    """Networks that are compared, and how; they are named as in `normfree.sources`."""

    model: str
    peers: tuple[str, ...]
    convert: bool = False  # the model, before it is measured
    batch: int = 16
    size: tuple[int, int] = (224, 224)  # pixels, height and width
    peer_size: tuple[int, int] | None = None  # of the peers' images, where it is another one
    channels_last: bool = False
    allocator: str = "default"  # of `ALLOCATORS`
    threads: int = 2
    accumulate: int = 1  # training steps: batches per update
    compile: bool = False  # all networks, by `torch.compile`
    recompute_weights: bool = False  # of ours; see `normfree.nn.recompute_weights`
    rounds: int = 9  # in each process
    processes: int = 3  # one after the other: where memory comes to lie moves a ratio, too, once per process

    def __post_init__(self) -> None:
        if min(self.batch, self.threads, self.processes, self.accumulate) < 1 or self.rounds < 2:
            raise ValueError("batch, accumulate, threads and processes must be at least 1, rounds at least 2")

    @property
    def ours(self) -> str:
        """Name of what is compared with the peers."""
        return f"{self.model}, converted" if self.convert else self.model

    def candidates(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Make name, new network and images of ours and of every peer, after torch was set up as asked."""
        torch.manual_seed(0)
        torch.set_num_threads(self.threads)
        layout: Any = torch.channels_last if self.channels_last else torch.contiguous_format
        for name in (self.ours, *self.peers):
            is_ours = name == self.ours
            model = model_factory(self.model if is_ours else name)()
            if is_ours and self.convert:
                model = convert(model, torch.randn(2, 3, *self.size)).model
            if is_ours and self.recompute_weights:
                recompute_weights(model)
            x = torch.randn(self.batch, 3, *(self.size if is_ours else self.peer_size or self.size))
            yield name, open_and_steady(model).to(memory_format=layout), x.contiguous(memory_format=layout)


def added_peak(function: Callable[..., object], *args: Any) -> int:
    """Return the bytes of resident memory that a call adds at its peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    function(*args)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_processes(module: str, setting: Setting, advance: Callable[[], None] = lambda: None) -> list[Any]:
    """Collect what `serve` prints in each process, `python -m module`, under the setting's allocator.

    `advance` is called after each.

    Raises RuntimeError with the end of its error output if one fails.
    """
    environment = os.environ | {"GLIBC_TUNABLES": ALLOCATORS[setting.allocator]}
    command = [sys.executable, "-m", module, json.dumps(asdict(setting))]
    found = []
    for _ in range(setting.processes):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{module} failed: {done.stderr[-2000:]}")
        found.append(json.loads(done.stdout))
        advance()
    return found


def serve(measure: Callable[[Setting], Any]) -> None:
    """Measure the setting that `in_processes` gives to this process, and print it."""
    given = json.loads(sys.argv[1])
    for name in ("size", "peer_size"):
        given[name] = given[name] and tuple(given[name])
    setting = Setting(**given)
    print(json.dumps(measure(setting)))


def machine() -> dict[str, Any]:
    """Describe where and with what it is measured."""
    packages = ("torch", "timm", "torchvision")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
