"""Time and kept memory of a training step (forward and backward, float32) beside the peers'."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from normfree.benchmarks.measure import Setting, in_processes, interleave, kept_bytes, ratios, serve

PEERS = (
    "limit: plain convolutions",
    "torchvision resnet50",
    "timm resnetv2_50 (BatchNorm)",
    "timm nf_resnet50",
    "timm nf_resnet50, paper's form",
)


def train_step(setting: Setting) -> list[dict[str, Any]]:
    """One row per peer: ratios of our time and kept bytes to it; they ran interleaved, in their own processes."""
    runs = in_processes(__spec__.name, setting)
    kept = runs[0]["kept"]
    ours = kept[setting.ours]
    return [
        asdict(ratio) | {"kept": ours, "peer_kept": kept[ratio.peer], "kept_ratio": ours / kept[ratio.peer]}
        for ratio in ratios([run["times"] for run in runs], setting.ours)
    ]


def _measure(setting: Setting) -> dict[str, Any]:
    steps, kept = {}, {}
    for name, model, x in setting.candidates():
        steps[name] = _step(model.train(), x)
        kept[name] = kept_bytes(model, x)
    return {"times": interleave(steps, setting.ours, rounds=setting.rounds), "kept": kept}


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        model(x).sum().backward()
        model.zero_grad()

    return step


if __name__ == "__main__":
    serve(_measure)
