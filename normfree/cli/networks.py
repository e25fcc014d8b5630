"""The networks that commands are given."""

import functools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from normfree.sources import model_factory


def network_factory(name: str) -> Callable[[], nn.Module]:
    """`model_factory`, and of the folder of a run its trained network."""
    if (Path(name) / "data.json").is_file():
        from normfree.training import load_run

        return functools.partial(load_run, name)
    return model_factory(name)
