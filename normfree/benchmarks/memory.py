"""Peak resident memory of a training step, over what model, images and momentum take, beside the peers'."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from normfree.benchmarks.measure import Setting, added_peak, in_processes, serve
from normfree.benchmarks.train_step import step

PEERS = ("torchvision:resnet50",)


def memory(setting: Setting, advance: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Measure one row per peer: the ratio of our peak to its own, each in processes where nothing else runs.

    The allocator returns what is freed at once, whatever the setting says.
    """
    alone = replace(setting, peers=(), allocator="returning")
    ours = _peaks(alone, advance)
    rows = []
    for peer in setting.peers:
        theirs = _peaks(replace(alone, model=peer, convert=False, size=setting.peer_size or setting.size), advance)
        peaks = statistics.median(ours), statistics.median(theirs)
        rows.append({"peer": peer, "ratio": peaks[0] / peaks[1], "ours_bytes": peaks[0], "peer_bytes": peaks[1]})
    return rows


def _peaks(setting: Setting, advance: Callable[[], None]) -> list[int]:
    return in_processes(__spec__.name, setting, advance)


def _measure(setting: Setting) -> int:
    ((_, model, x),) = setting.candidates()
    run = step(model.train(), x, setting.accumulate)
    run()  # imports, thread pools, kernels, momentum
    return added_peak(run)


if __name__ == "__main__":
    serve(_measure)
