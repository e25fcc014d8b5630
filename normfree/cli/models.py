"""`normfree models`: the networks of this package."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import tyro

from normfree.cli.arguments import Size, height_and_width
from normfree.cli.output import Json, progress, show_json, show_table
from normfree.errors import suggest
from normfree.models import list_models
from normfree.models.cost import Cost, cost


def models(
    pattern: Annotated[str, tyro.conf.Positional] = "*",
    /,
    *,
    size: Size = (),
    json_output: Json = False,
) -> None:
    """List the paper's networks with their parameters and multiply-accumulates (at their training size).

    Args:
        pattern: Only names that match, such as "nf_*" or "resnet50".
        size: Height and width, or one number for both, at which multiply-accumulates are counted instead.
        json_output: Print a JSON list instead of a table.
    """
    image_size = height_and_width(size)
    names = list_models(pattern if any(c in pattern for c in "*?[") else f"*{pattern}*")
    if not names:
        raise ValueError(f"no model matches {pattern!r}{suggest(pattern, list_models())}")

    def costs() -> Iterator[Cost]:
        with progress() as bar:
            for name in bar.track(names, description="counting"):
                yield cost(name, size=image_size if len(size) == 2 else image_size and image_size[0])

    if json_output:
        show_json([asdict(entry) for entry in costs()])
        return
    show_table(
        ("model", "parameters", "multiply-accumulates", "size", "test size"),
        ((c.name, str(c.parameters), str(c.macs), str(c.size), str(c.test_size)) for c in costs()),
    )
