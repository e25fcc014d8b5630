"""Peak resident memory of a training step, over what model, images and momentum take, beside the peers'."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from normfree.benchmarks.measure import Setting, added_peak, in_processes, serve
from normfree.benchmarks.train_step import step

PEERS = ("torchvision:resnet50",)


def memory(setting: Setting, advance: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Measure one row per peer: the ratio of our peak to its own, each in processes where nothing else runs."""
    alone = replace(setting, peers=())
    ours = in_processes(__spec__.name, alone, advance)
    rows = []
    for peer in setting.peers:
        size = setting.peer_size or setting.size
        other = replace(alone, model=peer, convert=False, recompute_weights=False, size=size)
        theirs = in_processes(__spec__.name, other, advance)
        peaks = statistics.median(ours), statistics.median(theirs)
        rows.append({"peer": peer, "ratio": peaks[0] / peaks[1], "ours_bytes": peaks[0], "peer_bytes": peaks[1]})
    return rows


def _measure(setting: Setting) -> int:
    ((_, model, x),) = setting.candidates()
    run = step(model.train(), x, setting)
    run()  # imports, thread pools, kernels, momentum
    return added_peak(run)


if __name__ == "__main__":
    serve(_measure)
