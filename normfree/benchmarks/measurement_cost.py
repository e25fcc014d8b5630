"""Costs of `characterize` and `convert`: time and peak memory beside one plain `no_grad` forward in the same modes.

    python -m normfree.benchmarks.measurement_cost [--rounds 9] [--depths 50 288] [--batch 8]

Both sides of a ratio run in turn in one process; peak memory is that of separate processes, above what is there
before the run (the model and its input).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfree.benchmarks.measure import added_peak
from normfree.conversion import convert
from normfree.models import create_model
from normfree.signal import SignalMonitor, characterize
from normfree.trace.preparation import measuring

MONITOR_LIMIT = 0.01  # of the time of a training, with everything measured at every hundredth step
TIME_LIMIT, MEMORY_LIMIT, CONVERSION_LIMIT = 1.6, 1.10, 5.0


def plain(model: nn.Module, x: Tensor) -> None:
    """A forward pass in the modes of a measurement."""
    with torch.no_grad(), measuring(model, batch_stats=True):
        model(x)


def with_prediction(model: nn.Module, x: Tensor) -> None:
    """Characterize, and predict."""
    characterize(model, x, predict=True)


def timed(function: Callable[..., Any], *args: Any) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def monitored_steps(name: str, batch: int, size: int, rounds: int) -> dict[str, float]:
    """Times of training steps in which a monitor measures everything, and of others, interleaved."""
    model, x = create_model(name), torch.randn(batch, 3, size, size)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def measured_step() -> None:
        step()
        monitor.collect()  # else the next step would make the rows

    step()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with SignalMonitor(model, every=2, statistics="all", optimizer=optimizer) as monitor:
        step()
        monitor.step = 0
        for _ in range(rounds):
            seconds[True].append(timed(measured_step))
            seconds[False].append(timed(step))
    ratios = sorted(a / b for a, b in zip(seconds[True], seconds[False], strict=True))
    ratio = statistics.median(ratios)
    return {"ratio": ratio, "ratio_min": ratios[0], "ratio_max": ratios[-1], "of_a_training": (ratio - 1) / 100}


def time_ratio(name: str, measured: Callable[..., Any], batch: int, rounds: int) -> dict[str, float]:
    """Times of `characterize` or `convert` and of a plain forward, interleaved."""
    model, x = create_model(name), torch.randn(batch, 3, 224, 224)
    plain(model, x)
    measured(model, x)
    pairs = [(timed(measured, model, x), timed(plain, model, x)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        f"{measured.__name__}_s": statistics.median(a for a, _ in pairs),
        "forward_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
    }


def peak_bytes(depth: int, batch: int, what: str) -> int:
    """Peak resident memory that a run adds, in a process of its own."""
    out = subprocess.run(
        [sys.executable, __file__, "--peak", what, "--depths", str(depth), "--batch", str(batch)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(out.stdout.split()[-1])


def print_peak(depth: int, batch: int, what: str) -> None:
    """Run the process that `peak_bytes` starts."""
    model, x = create_model(f"nf_resnet{depth}"), torch.randn(batch, 3, 224, 224)
    characterize(create_model("nf_resnet26", width=1), torch.randn(2, 3, 64, 64))  # imports, thread pools, kernels
    run: Callable[..., Any] = plain if what == "plain" else characterize
    print(added_peak(run, model, x))


def main() -> None:
    """Measure, print, and fail if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--depths", type=int, nargs="+", default=[50, 288])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peak", choices=["plain", "characterize"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.depths[0], options.batch, options.peak)
        return
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}, load {os.getloadavg()[0]:.2f}, batch {options.batch}×3×224×224")
    results = {}
    for depth in options.depths:
        row = time_ratio(f"nf_resnet{depth}", characterize, options.batch, options.rounds)
        peaks = {what: statistics.median(peak_bytes(depth, options.batch, what) for _ in range(7))
                 for what in ("plain", "characterize")}  # fmt: skip
        row |= {f"peak_{what}": peak for what, peak in peaks.items()}
        row["memory_ratio"] = peaks["characterize"] / peaks["plain"]
        results[f"nf_resnet{depth}"] = row
        time_range = f"[{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
        print(f"nf_resnet{depth}: time {row['ratio']:.2f} {time_range} of a forward's {row['forward_s']:.2f} s, "
              f"limit {TIME_LIMIT}; peak memory {row['memory_ratio']:.3f} of a forward's "
              f"{peaks['plain'] / 2**20:.0f} MiB, limit {MEMORY_LIMIT}")  # fmt: skip
        of = f"bn_resnet{depth}"
        cost = results[of] = time_ratio(of, convert, options.batch, options.rounds)
        print(f"convert {of}: {cost['ratio']:.2f} [{cost['ratio_min']:.2f}, {cost['ratio_max']:.2f}] forwards of "
              f"{cost['forward_s']:.2f} s, limit {CONVERSION_LIMIT}")  # fmt: skip
    results["monitor"] = watched = monitored_steps("nf_resnet50", options.batch, 128, options.rounds)
    print(f"monitor: a step with everything measured takes {watched['ratio']:.2f} "
          f"[{watched['ratio_min']:.2f}, {watched['ratio_max']:.2f}] of another, {watched['of_a_training']:.2%} of a "
          f"training at every hundredth, limit {MONITOR_LIMIT:.0%}")  # fmt: skip
    results["predict"] = predicted = time_ratio("nf_resnet50", with_prediction, options.batch, options.rounds)
    print(f"characterize(predict=True): {predicted['ratio']:.2f} [{predicted['ratio_min']:.2f}, "
          f"{predicted['ratio_max']:.2f}] forwards")  # fmt: skip
    print(json.dumps(results))
    limits = (("characterize_s", "ratio", TIME_LIMIT), ("characterize_s", "memory_ratio", MEMORY_LIMIT),
              ("convert_s", "ratio", CONVERSION_LIMIT))  # fmt: skip
    if watched["of_a_training"] > MONITOR_LIMIT or any(
        kind in row and row[what] > limit for row in results.values() for kind, what, limit in limits
    ):
        sys.exit("a limit is exceeded")


if __name__ == "__main__":
    main()
