"""`normfree models`: the networks of this package."""

from collections.abc import Iterator
from typing import Annotated

import torch
import tyro

from normfree.cli.output import progress, show_table
from normfree.errors import suggest
from normfree.models import create_model, list_models


def models(pattern: Annotated[str, tyro.conf.Positional] = "*", /) -> None:
    """List the paper's networks.

    Args:
        pattern: Only names that match, such as "nf_*" or "resnet50".
    """
    names = list_models(pattern if any(c in pattern for c in "*?[") else f"*{pattern}*")
    if not names:
        raise ValueError(f"no model matches {pattern!r}{suggest(pattern, list_models())}")

    def rows() -> Iterator[tuple[str, str]]:
        with progress() as bar:
            for name in bar.track(names, description="counting"):
                with torch.device("meta"):
                    parameters = sum(p.numel() for p in create_model(name).parameters())
                yield name, str(parameters)

    show_table(("model", "parameters"), rows())
