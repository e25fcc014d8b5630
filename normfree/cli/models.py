"""`normfree models`: the networks of this package."""

from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from normfree.cli.output import progress
from normfree.models import create_model, list_models
from normfree.models.registry import suggest


def models(pattern: Annotated[str, tyro.conf.Positional] = "*", /) -> None:
    """List the paper's networks.

    Args:
        pattern: Only names that match, such as "nf_*" or "resnet50".
    """
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = list_models(glob)
    if not names:
        raise ValueError(f"no model matches {pattern!r}{suggest(pattern, list_models())}")
    console = Console()
    table = Table("model", header_style="bold")
    table.add_column("parameters", justify="right")
    with progress() as bar, torch.device("meta"):
        for name in bar.track(names, description="counting"):
            parameters = sum(p.numel() for p in create_model(name).parameters())
            if console.is_terminal:
                table.add_row(name, f"{parameters / 1e6:.2f} M")
            else:
                print(name, parameters, sep="\t", flush=True)
    if console.is_terminal:
        console.print(table)
