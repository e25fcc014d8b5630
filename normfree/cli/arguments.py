"""Arguments of the commands: models, images and their sizes, each given in one way everywhere."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor, nn

from normfree.images import batch_function
from normfree.sources import model_factory
from normfree.trace.inputs import input_shape, noise

Input = Annotated[str, tyro.conf.arg(metavar="noise|photos|DIR")]
"""Type of the images of a command: white noise, crops of two real photographs, or images of a folder."""

Size = Annotated[tuple[int, ...], tyro.conf.arg(metavar="H [W]", help_behavior_hint="")]
"""Type of an image size: height and width, or one number for both; read by `height_and_width`."""


def network_factory(name: str) -> Callable[[], nn.Module]:
    """Apply `model_factory`; the folder of a run, or of one of its checkpoints, names the trained network."""
    if any((Path(name) / file).is_file() for file in ("data.json", "position.json")):
        from normfree.training import load_run

        return functools.partial(load_run, name)
    return model_factory(name)


def image_function(source: str, batch: int, size: tuple[int, int] | None) -> Callable[[nn.Module], Tensor]:
    """Make a function of a model that draws a batch of images for it, of the model's own size where none is given."""
    if source == "noise":
        return functools.partial(noise, batch=batch, size=size)
    return batch_function(source, batch, functools.partial(input_shape, size=size))


def height_and_width(size: tuple[int, ...]) -> tuple[int, int] | None:
    """Read a size; None where none is given. Raises ValueError for more than two numbers, or less than one pixel."""
    if len(size) > 2:
        raise ValueError(f"size is {size}; give height and width, or one number for both")
    if size and min(size) < 1:
        raise ValueError(f"size is {size}; height and width must be at least 1 pixel")
    return (size[0], size[-1]) if size else None
