"""`normfree models`: the networks of this package."""

from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

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
    with torch.device("meta"):
        rows = [(name, sum(p.numel() for p in create_model(name).parameters())) for name in names]
    if not console.is_terminal:
        for name, parameters in rows:
            print(name, parameters, sep="\t")
        return
    table = Table("model", header_style="bold")
    table.add_column("parameters", justify="right")
    for name, parameters in rows:
        table.add_row(name, f"{parameters / 1e6:.2f} M")
    console.print(table)
