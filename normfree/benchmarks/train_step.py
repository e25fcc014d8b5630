"""Time and kept memory of a training step (forward and backward, float32) beside the peers'."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from normfree.benchmarks.measure import Setting, compare, in_process, kept_bytes, serve

PEERS = (
    "limit: plain convolutions",
    "torchvision resnet50",
    "timm resnetv2_50 (BatchNorm)",
    "timm nf_resnet50",
    "timm nf_resnet50, paper's form",
)


def train_step(setting: Setting) -> list[dict[str, Any]]:
    """One row per peer: ratios of our time and of our kept bytes to it; they ran interleaved, in their own process."""
    return in_process(__spec__.name, setting)


def _rows(setting: Setting) -> list[dict[str, Any]]:
    steps, kept = {}, {}
    for name, model, x in setting.candidates():
        steps[name] = _step(model.train(), x)
        kept[name] = kept_bytes(model, x)
    ours = kept[setting.ours]
    return [
        asdict(ratio) | {"kept": ours, "peer_kept": kept[ratio.peer], "kept_ratio": ours / kept[ratio.peer]}
        for ratio in compare(steps, setting.ours, rounds=setting.rounds)
    ]


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        model(x).sum().backward()
        model.zero_grad()

    return step


if __name__ == "__main__":
    serve(_rows)
