"""Time of inference (float32), folded, beside the peers' with their BatchNorm folded."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from normfree.benchmarks.measure import compare, in_process
from normfree.benchmarks.networks import NETWORKS
from normfree.fold import fold, has_scaled_convolutions

PEERS = ("torchvision resnet50",)


def inference(
    ours: str = "nf_resnet50",
    peers: tuple[str, ...] = PEERS,
    *,
    batch: int = 16,
    size: int = 224,
    channels_last: bool = False,
    allocator: str = "default",
    threads: int = 2,
    rounds: int = 9,
) -> Iterator[dict[str, Any]]:
    """One row per peer: the ratio of the time of `ours`, folded, to it, interleaved in a process of their own."""
    setting = {
        "ours": ours, "peers": list(peers), "batch": batch, "size": size, "channels_last": channels_last,
        "threads": threads, "rounds": rounds,
    }  # fmt: skip
    return in_process("normfree.benchmarks.inference", setting, allocator)


def _rows(setting: dict[str, Any]) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    torch.set_num_threads(setting["threads"])
    layout = torch.channels_last if setting["channels_last"] else torch.contiguous_format
    x = torch.randn(setting["batch"], 3, setting["size"], setting["size"]).contiguous(memory_format=layout)
    steps = {}
    for name in [setting["ours"], *setting["peers"]]:
        model = NETWORKS[name]().eval()
        model = fold(model) if has_scaled_convolutions(model) else _without_batch_norm(model)
        steps[name] = _step(model.to(memory_format=layout), x)
    for ratio in compare(steps, setting["ours"], rounds=setting["rounds"]):
        yield ratio.to_dict()


def _step(model: nn.Module, x: torch.Tensor) -> Any:
    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def _without_batch_norm(model: nn.Module) -> nn.Module:
    """torchvision's ResNets with every BatchNorm in the convolution before it; in place."""
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
    for row in _rows(json.loads(sys.argv[1])):
        print(json.dumps(row), flush=True)
