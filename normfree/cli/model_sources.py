"""The networks that commands are given."""

import functools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from normfree.sources import model_factory


def network_factory(name: str) -> Callable[[], nn.Module]:
    """`model_factory`, and of the folder of a run, or of one of its checkpoints, the trained network."""
    if any((Path(name) / file).is_file() for file in ("data.json", "position.json")):
        from normfree.training import load_run

        return functools.partial(load_run, name)
    return model_factory(name)
