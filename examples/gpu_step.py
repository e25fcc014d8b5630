"""Time and memory of a training step on a GPU: NF-ResNet-50 beside torchvision's and timm's ResNet-50s.

    pip install 'normfree[timm]'
    python examples/gpu_step.py [--batch 128] [--size 224] [--float32] [--compile]

Forward, backward and an SGD update in channels_last, under bfloat16 autocast unless `--float32`. The first four steps
are not counted: they choose convolutions and compile kernels.
"""

import argparse
import statistics
import time

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import normfree

NETWORKS = {
    "torchvision resnet50 (BatchNorm)": torchvision.models.resnet50,
    "timm nf_resnet50": lambda: timm.create_model("nf_resnet50"),
    "nf_resnet50": lambda: normfree.create_model("nf_resnet50"),
}


def measure(model: nn.Module, images: Tensor, labels: Tensor, *, float32: bool, steps: int = 12) -> list[float]:
    """Seconds of each step, after four others."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    seconds = []
    for number in range(4 + steps):
        torch.cuda.synchronize()
        if number == 4:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=not float32):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[4:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, which takes minutes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; `normfree bench` measures on CPUs")
    images = torch.randn(options.batch, 3, options.size, options.size, device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (options.batch,), device="cuda")
    for name, make in NETWORKS.items():
        model = make().to("cuda", memory_format=torch.channels_last).train()
        step = torch.compile(model) if options.compile else model
        seconds = measure(step, images, labels, float32=options.float32)
        median, memory = statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30
        print(f"{name}: {1e3 * median:.1f} ms ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}), {memory:.2f} GiB")
        del model, step


if __name__ == "__main__":
    main()
