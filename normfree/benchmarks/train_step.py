"""Time and kept memory of a training step (forward and backward, float32) beside the peers'."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from normfree.benchmarks.measure import compare, in_process, kept_bytes
from normfree.benchmarks.networks import NETWORKS

PEERS = (
    "limit: plain convolutions",
    "torchvision resnet50",
    "timm resnetv2_50 (BatchNorm)",
    "timm nf_resnet50",
    "timm nf_resnet50, paper's form",
)


def train_step(
    ours: str = "nf_resnet50",
    peers: tuple[str, ...] = PEERS,
    *,
    batch: int = 16,
    size: int = 224,
    peer_size: int | None = None,
    channels_last: bool = False,
    allocator: str = "default",
    threads: int = 2,
    rounds: int = 9,
) -> Iterator[dict[str, Any]]:
    """One row per peer: ratios of time and of kept bytes of `ours` to it; they ran interleaved, in their own process.

    Names are keys of `NETWORKS`; `peer_size` is the image size of the peers where it is another one.
    """
    setting = {
        "ours": ours, "peers": list(peers), "batch": batch, "size": size, "peer_size": peer_size or size,
        "channels_last": channels_last, "threads": threads, "rounds": rounds,
    }  # fmt: skip
    return in_process("normfree.benchmarks.train_step", setting, allocator)


def _rows(setting: dict[str, Any]) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    torch.set_num_threads(setting["threads"])
    layout = torch.channels_last if setting["channels_last"] else torch.contiguous_format
    names = [setting["ours"], *setting["peers"]]
    steps, kept = {}, {}
    for name in names:
        model = NETWORKS[name]().to(memory_format=layout).train()
        size = setting["size"] if name == setting["ours"] else setting["peer_size"]
        x = torch.randn(setting["batch"], 3, size, size).contiguous(memory_format=layout)

        def step(model: torch.nn.Module = model, x: torch.Tensor = x) -> None:
            model(x).sum().backward()
            model.zero_grad()

        steps[name] = step
        kept[name] = kept_bytes(model, x)
    for ratio in compare(steps, setting["ours"], rounds=setting["rounds"]):
        yield ratio.to_dict() | {
            "kept": kept[setting["ours"]],
            "peer_kept": kept[ratio.peer],
            "kept_ratio": kept[setting["ours"]] / kept[ratio.peer],
        }


if __name__ == "__main__":
    for row in _rows(json.loads(sys.argv[1])):
        print(json.dumps(row), flush=True)
