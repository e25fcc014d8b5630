"""`normfree convert`: a network without its normalizers."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from normfree.cli.model_sources import network_factory
from normfree.cli.output import announce, check_writable
from normfree.conversion import convert as convert_model
from normfree.images import batch_function
from normfree.signal import compare
from normfree.signal.figure import SUFFIXES
from normfree.trace.inputs import input_shape, noise


def convert(
    model: Annotated[str, tyro.conf.Positional],
    /,
    input: Annotated[str, tyro.conf.arg(metavar="noise|photos|DIR")] = "photos",
    batch: int = 16,
    size: int | None = None,
    keep: Literal["weights", "function"] = "weights",
    alpha: float | None = None,
    exclude: tuple[str, ...] = (),
    depthwise: Literal["standardize", "scale"] = "standardize",
    seed: int = 0,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.safetensors")] = None,
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html|.png|.svg|.csv|.json")] = None,
) -> None:
    """Convert a network with BatchNorm into one without, with the signal of the given images under control.

    Args:
        model: timm:NAME, torchvision:NAME, or package.module:factory, which may load its weights.
        input: White noise, crops of two real photographs, or images of a folder.
        batch: Number of images to calibrate with.
        size: Height and width; the model's own if not given.
        keep: The weights alone, or of a trained network, to be trained on at a low rate, what it computes.
        alpha: What residual branches of unit variance are multiplied by: 0.2, unless the function is kept.
        exclude: Paths of modules that stay as they are; glob patterns too.
        depthwise: Standardize the filters of depthwise convolutions, or scale them only.
        seed: Of the parameters, where they are new, and of the images.
        out: Write the tensors, and the plan that normfree.load_converted follows.
        report: Write a figure of the signal before and after, or its numbers.
    """
    if out is not None:
        check_writable(out, (".safetensors",))
    if report is not None:
        check_writable(report, SUFFIXES)
    torch.manual_seed(seed)
    network = network_factory(model)()
    image_size = None if size is None else (size, size)
    draw: Callable[[nn.Module], Tensor] = functools.partial(noise, batch=batch, size=image_size)
    if input != "noise":
        draw = batch_function(input, batch, functools.partial(input_shape, size=image_size))
    conversion = convert_model(network, draw(network), keep=keep, alpha=alpha, exclude=exclude, depthwise=depthwise)
    print(conversion)
    if out is not None:
        announce([conversion.save(out)])
    if report is not None:
        rows = {"before": conversion.before, "after": conversion.after}
        announce([compare(rows, title=f"{model}, converted").save(report)])
