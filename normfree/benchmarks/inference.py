"""Time of inference (float32), folded, beside the peers' with their BatchNorm folded."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from normfree.benchmarks.measure import Setting, in_processes, interleave, ratios, serve
from normfree.folding import fold, has_scaled_layers

PEERS = ("torchvision:resnet50",)


def inference(setting: Setting, advance: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Measure one row per peer: the ratio of our time, folded; both run interleaved, in processes of their own.

    Raises ValueError for what only training has.
    """
    if setting.accumulate > 1 or setting.recompute_weights:
        raise ValueError("accumulate and recompute_weights are of training steps; inference has neither")
    return [asdict(ratio) for ratio in ratios(in_processes(__spec__.name, setting, advance), setting.ours)]


def _measure(setting: Setting) -> dict[str, list[float]]:
    steps = {}
    for name, model, x in setting.candidates():
        model.eval()
        folded = fold(model) if has_scaled_layers(model) else _fuse_batch_norm(model)
        if setting.compile:
            folded.compile()
        steps[name] = _step(folded, x)
    return interleave(steps, setting.ours, rounds=setting.rounds)


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def _fuse_batch_norm(model: nn.Module) -> nn.Module:
    """Put every BatchNorm of torchvision's ResNets into the convolution before it; in place."""
    for module in list(model.modules()):
        previous = ""
        for name, child in list(module.named_children()):
            # What runs one after the other is registered one after the other: conv1, bn1 and 0, 1.
            if isinstance(child, nn.BatchNorm2d) and isinstance(getattr(module, previous, None), nn.Conv2d):
                setattr(module, previous, fuse_conv_bn_eval(getattr(module, previous), child))
                setattr(module, name, nn.Identity())
            previous = name
    return model


if __name__ == "__main__":
    serve(_measure)
