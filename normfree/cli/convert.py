"""`normfree convert`: a network without its normalizers."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from normfree.cli.arguments import Input, Size, height_and_width, image_function, network_factory
from normfree.cli.output import Json, announce, check_writable, show_json
from normfree.conversion import convert as convert_model
from normfree.signal import compare
from normfree.signal.figure import SUFFIXES


def convert(
    model: Annotated[str, tyro.conf.Positional],
    /,
    input: Input = "noise",
    batch: int = 16,
    size: Size = (),
    keep: Literal["weights", "function"] = "weights",
    alpha: float | None = None,
    exclude: tuple[str, ...] = (),
    depthwise: Literal["standardize", "scale"] = "standardize",
    seed: int = 0,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.safetensors")] = None,
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html|.png|.svg|.csv|.json")] = None,
    json_output: Json = False,
) -> None:
    """Convert a network with BatchNorm into one without, with the signal of the given images under control.

    Args:
        model: timm:NAME, torchvision:NAME, package.module:factory, which may load its weights, or the folder of a run.
        input: White noise, crops of two real photographs, or images of a folder; best are images of yours.
        batch: Number of images to calibrate with.
        size: Height and width, or one number for both; the model's own if not given.
        keep: The weights alone, or of a trained network, to be trained on at a low rate, what it computes.
        alpha: What residual branches of unit variance are multiplied by: 0.2, unless the function is kept.
        exclude: Paths of modules that stay as they are; glob patterns too.
        depthwise: Standardize the filters of depthwise convolutions, or scale them only.
        seed: Of the parameters, where they are new, and of the images.
        out: Write the tensors, and the plan that normfree.load_converted follows.
        report: Write a figure of the signal before and after, or its numbers.
        json_output: Print every change and the signal before and after as JSON.
    """
    if out is not None:
        check_writable(out, (".safetensors",))
    if report is not None:
        check_writable(report, SUFFIXES)
    draw = image_function(input, batch, height_and_width(size))
    torch.manual_seed(seed)
    network = network_factory(model)()
    images = draw(network)
    conversion = convert_model(network, images, keep=keep, alpha=alpha, exclude=exclude, depthwise=depthwise)
    written = []
    if out is not None:
        written.append(conversion.save(out))
    if report is not None:
        rows = {"before": conversion.before, "after": conversion.after}
        written.append(compare(rows, title=f"{model}, converted").save(report))
    if json_output:
        show_json(
            {
                "changes": [asdict(change) for change in conversion.changes],
                "departure": conversion.departure,
                "before": conversion.before.to_dicts(),
                "after": conversion.after.to_dicts(),
                "written": written,
            }
        )
        return
    print(conversion)
    announce(written)
