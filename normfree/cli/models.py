"""`normfree models`: the networks of this package."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import tyro

from normfree.cli.output import progress, show_table
from normfree.errors import suggest
from normfree.models import list_models
from normfree.models.cost import Cost, cost


def models(
    pattern: Annotated[str, tyro.conf.Positional] = "*",
    /,
    *,
    size: int | None = None,
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """List the paper's networks with their parameters and multiply-accumulates (at their training size).

    Args:
        pattern: Only names that match, such as "nf_*" or "resnet50".
        size: Count multiply-accumulates at this image size instead, in pixels.
        json_output: Print a JSON list instead of a table.
    """
    if size is not None and size < 1:
        raise ValueError(f"size is {size}; it must be at least 1")
    names = list_models(pattern if any(c in pattern for c in "*?[") else f"*{pattern}*")
    if not names:
        raise ValueError(f"no model matches {pattern!r}{suggest(pattern, list_models())}")

    def costs() -> Iterator[Cost]:
        with progress() as bar:
            for name in bar.track(names, description="counting"):
                yield cost(name, size=size)

    if json_output:
        print(json.dumps([asdict(entry) for entry in costs()], indent=2))
        return
    show_table(
        ("model", "parameters", "multiply-accumulates", "size", "test size"),
        ((c.name, str(c.parameters), str(c.macs), str(c.size), str(c.test_size)) for c in costs()),
    )
