"""`normfree spp`: signal propagation of any models."""

from pathlib import Path
from typing import Annotated

import tyro

from normfree.cli.arguments import Input, Size, height_and_width, image_function, network_factory
from normfree.cli.output import Json, announce, check_writable, progress
from normfree.signal import SignalReport, characterize
from normfree.signal.figure import SUFFIXES, compare
from normfree.signal.formats import to_json


def spp(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...", help_behavior_hint="")],
    /,
    input: Input = "noise",
    batch: int = 4,
    size: Size = (),
    seeds: int = 1,
    open: bool = True,
    backward: bool = False,
    predict: bool = False,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html|.png|.svg|.md|.csv|.json")] = None,
    json_output: Json = False,
) -> None:
    """Signal propagation: channel mean and variance at every residual block, at initialisation or of a trained network.

    Args:
        models: nf_resnet50 (ours), timm:NAME, torchvision:NAME, package.module:factory, or the folder of a run.
        input: White noise, crops of two real photographs, or images of a folder.
        batch: Number of examples.
        size: Height and width, or one number for both; the model's own if not given.
        seeds: How many times to draw parameters and inputs anew.
        open: Set to one what closes branches at initialisation (SkipInit, LayerScale, zero gains).
        backward: The gradient's statistics too.
        predict: What the statistics should be too, from weights and structure alone.
        out: Also write a figure, or the numbers.
        json_output: Print the numbers as JSON instead of tables.
    """
    if not models:
        raise ValueError("name at least one model, such as nf_resnet50 or timm:resnet50 (`normfree models` lists ours)")
    if out is not None:
        check_writable(out, SUFFIXES)
    draw = image_function(input, batch, height_and_width(size))
    factories = [(name, network_factory(name)) for name in models]

    reports: list[SignalReport] = []
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(factories))
            for name, factory in factories:
                bar.update(task, description=name)
                reports.append(
                    characterize(
                        factory, draw, seeds=seeds, open_branches=open, backward=backward, predict=predict, name=name
                    )
                )
                bar.advance(task)
    finally:
        # Those before the one that failed, too.
        if json_output and reports:
            print(to_json(reports), end="")
        for report in () if json_output else reports:
            print(report)
    if out is not None:
        compare(reports, title="Signal propagation").save(out)
        if not json_output:
            announce([out])
