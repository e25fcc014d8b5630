"""Seams of tiled inference: the same trained network on tiles and on the whole.

    python -m normfree.studies.seams --trained docs/results/segmentation-brain --out docs/results/segmentation-brain

Takes the networks that `normfree.studies.segmentation` has trained with two patches at a time and gives them the half
of the brain that they were not trained on: whole, and in tiles with a halo, from which the middle is kept. The halo is
at least the reach of the network, so that convolutions cannot tell the difference; what normalizes a tile by its own
statistics can. Differences are those of the logits, over their standard deviation in the whole.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from normfree.files.csv_tables import csv_text
from normfree.files.whole import write_whole
from normfree.plotting import altair, write_chart
from normfree.studies.learning_rates import chosen_rate
from normfree.studies.segmentation import KINDS, TEMPLATES, define, load_network, read_halves
from normfree.studies.trainings import StudyTables

HALO = 24  # voxels: the reach of the U-Net is 23


@torch.no_grad()
def in_tiles(network: nn.Module, image: Tensor, *, core: int, halo: int, multiple: int = 4) -> Tensor:
    """Return the output for an image (C, X, Y, Z), put together from tiles of `core` voxels that see `halo` more.

    Tiles begin at multiples of `multiple`, the stride of the network. Raises ValueError where core or halo is none.
    """
    if core % multiple or halo % multiple or core < 1 or halo < 0:
        raise ValueError(f"core is {core} and halo {halo}; they must be multiples of {multiple}")
    sides, out = image.shape[1:], None
    for starts in itertools.product(*(range(0, side, core) for side in sides)):
        stops = [min(start + core, side) for start, side in zip(starts, sides, strict=True)]
        seen = [(max(0, a - halo), min(b + halo, side)) for a, b, side in zip(starts, stops, sides, strict=True)]
        part = network(image[:, *(slice(a, b) for a, b in seen)][None])[0]
        if out is None:
            out = part.new_empty(part.shape[0], *sides)
        inner = [slice(a - first, b - first) for a, b, (first, _) in zip(starts, stops, seen, strict=True)]
        out[:, *(slice(a, b) for a, b in zip(starts, stops, strict=True))] = part[:, *inner]
    assert out is not None
    return out


def seam(network: nn.Module, image: Tensor, *, core: int = 24, halo: int = HALO) -> Tensor:
    """Return the largest difference over the classes, (X, Y, Z), in standard deviations of the whole's logits."""
    with torch.no_grad():
        whole = network(image[None])[0]
    return (in_tiles(network, image, core=core, halo=halo) - whole).abs().amax(0) / whole.std()


def draw(differences: dict[str, Tensor], path: Path) -> Path:
    """Draw a horizontal plane of each kind's differences."""
    alt = altair()
    largest = max(float(plane.max()) for plane in differences.values())
    panels = []
    for kind, plane in differences.items():
        points = [
            {"x": x, "y": y, "difference": float(value)}
            for x, column in enumerate(plane.tolist())
            for y, value in enumerate(column)
        ]
        chart = alt.Chart(alt.Data(values=points), title=kind, width=4 * plane.shape[0], height=4 * plane.shape[1])
        panels.append(
            chart.mark_rect().encode(
                x=alt.X("x:O", axis=None),
                y=alt.Y("y:O", axis=None, sort="descending"),
                color=alt.Color("difference:Q", title="standard deviations").scale(
                    scheme="inferno", domain=[0, largest]
                ),
            )
        )
    return write_chart(alt.hconcat(*panels).configure_view(stroke=None).to_dict(), path)


def measure(trained: Path, out: Path, *, templates: Path = TEMPLATES, patches: int = 600) -> Sequence[dict[str, str]]:
    """Measure the seams of all kinds that have been trained; write seams.csv and seams.png.

    Raises FileNotFoundError where nothing has been trained.
    """
    left, right = read_halves(templates)
    study, tables = define(patches), StudyTables(trained)
    rows, planes = [], {}
    for kind in KINDS:
        cell = next(cell for cell in study.cells if (cell.row, cell.column) == (kind, "2"))
        tried = tables.tried(cell, 1)
        if not tried:
            continue
        lr = chosen_rate(study.rates, cell, tried)
        network = load_network(trained, replace(cell.recipe, lr=lr, seed=0), left)
        found = seam(network, right.image)
        planes[kind] = found[:, :, found.shape[2] // 2]
        rows.append({"kind": kind, "largest": f"{float(found.max()):.2g}", "mean": f"{float(found.mean()):.2g}"})
    if not rows:
        raise FileNotFoundError(f"{trained} holds no trained networks: run normfree.studies.segmentation first")
    write_whole(out / "seams.csv", csv_text(("kind", "largest", "mean"), rows))
    draw(planes, out / "seams.png")
    return rows


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--templates", type=Path, default=TEMPLATES)
    parser.add_argument("--patches", type=int, default=600)
    options = parser.parse_args()
    for row in measure(options.trained, options.out, templates=options.templates, patches=options.patches):
        print(row["kind"], row["largest"], row["mean"], sep="\t")


if __name__ == "__main__":
    main()
