"""The training step: time and kept memory (forward, backward and update, float32) beside the peers'."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from normfree.benchmarks.measure import Setting, in_processes, interleave, kept_bytes, ratios, serve
from normfree.nn import shared_weights

PEERS = (
    "normfree.benchmarks.peers:plain_resnet50",
    "torchvision:resnet50",
    "timm:resnetv2_50.a1h_in1k",
    "timm:nf_resnet50",
    "normfree.benchmarks.peers:timm_nf_resnet50_of_the_paper",
)


def train_step(setting: Setting, advance: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Measure one row per peer: ratios of our time and kept bytes; both run interleaved, in processes of their own.

    What is kept is that of the networks before they are compiled.
    """
    runs = in_processes(__spec__.name, setting, advance)
    kept = runs[0]["kept"]
    ours = kept[setting.ours]
    return [
        asdict(ratio) | {"kept": ours, "peer_kept": kept[ratio.peer], "kept_ratio": ours / kept[ratio.peer]}
        for ratio in ratios([run["times"] for run in runs], setting.ours)
    ]


def _measure(setting: Setting) -> dict[str, Any]:
    steps, kept = {}, {}
    for name, model, x in setting.candidates():
        kept[name] = kept_bytes(model.train(), x)
        steps[name] = step(model, x, setting)
    return {"times": interleave(steps, setting.ours, rounds=setting.rounds), "kept": kept}


def step(model: nn.Module, x: Tensor, setting: Setting) -> Callable[[], None]:
    """Return a training step: forward and backward passes, one after the other, and an update by SGD with momentum."""
    if setting.compile:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9, foreach=True)

    def run() -> None:
        with shared_weights(model) if setting.accumulate > 1 else contextlib.nullcontext():
            for _ in range(setting.accumulate):
                model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


if __name__ == "__main__":
    serve(_measure)
