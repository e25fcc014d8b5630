"""`normfree spp`: signal propagation of any models."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor, nn

from normfree.cli.model_sources import network_factory
from normfree.cli.output import announce, check_writable, progress
from normfree.images import batch_function
from normfree.signal import SignalReport, characterize
from normfree.signal.figure import SUFFIXES, compare
from normfree.trace.inputs import input_shape, noise


def spp(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...", help_behavior_hint="")],
    /,
    input: Annotated[str, tyro.conf.arg(metavar="noise|photos|DIR")] = "noise",
    batch: int = 4,
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="H W", help_behavior_hint="")] = (),
    seeds: int = 1,
    open: bool = True,
    backward: bool = False,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html|.png|.svg|.csv|.json")] = None,
) -> None:
    """Signal propagation: channel mean and variance at every residual block, at initialisation.

    Args:
        models: nf_resnet50 (ours), timm:NAME, torchvision:NAME, package.module:factory, or the folder of a run.
        input: White noise, crops of two real photographs, or images of a folder.
        batch: Number of examples.
        size: Height and width, or one number for both; the model's own if not given.
        seeds: How many times to draw parameters and inputs anew.
        open: Set to one what closes branches at initialisation (SkipInit, LayerScale, zero gains).
        backward: The gradient's statistics too.
        out: Also write a figure, or the numbers.
    """
    if not models:
        raise ValueError("name at least one model, such as nf_resnet50 or timm:resnet50 (`normfree models` lists ours)")
    if out is not None:
        check_writable(out, SUFFIXES)
    if len(size) > 2:
        raise ValueError(f"size is {size}; give height and width, or one number for both")
    image_size = (size[0], size[-1]) if size else None
    factories = [(name, network_factory(name)) for name in models]
    draw: Callable[[nn.Module], Tensor] = functools.partial(noise, batch=batch, size=image_size)
    if input != "noise":
        draw = batch_function(input, batch, functools.partial(input_shape, size=image_size))

    reports: list[SignalReport] = []
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(factories))
            for name, factory in factories:
                bar.update(task, description=name)
                reports.append(
                    characterize(factory, draw, seeds=seeds, open_branches=open, backward=backward, name=name)
                )
                bar.advance(task)
    finally:
        # Those before the one that failed, too.
        for report in reports:
            print(report)
    if out is not None:
        announce([compare(reports, title="Signal propagation").save(out)])
