"""memory.csv: the memory that a training step of each cell adds at its peak."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from normfree.benchmarks.measure import added_peak
from normfree.files.csv_tables import append_csv, read_csv, reading_rows
from normfree.studies.study import Cell
from normfree.training.build import build
from normfree.training.data.datasets import Description
from normfree.training.recipes import Recipe

_COLUMNS = ("row", "column", "mebibytes")


def read_peaks(folder: Path) -> dict[tuple[str, str], float]:
    """Read MiB by row and column; none where nothing was measured. Raises ValueError for another file."""
    path = folder / "memory.csv"
    with reading_rows(path):
        return {(row["row"], row["column"]): float(row["mebibytes"]) for row in read_csv(path)[1]}


def measure_peak(folder: Path, cell: Cell, step: Callable[..., int], *args: Any) -> None:
    """Call `step`, which returns bytes, in a process of its own, unless the cell's peak is known, or not on Linux."""
    if Path("/proc/self/clear_refs").exists() and (cell.row, cell.column) not in read_peaks(folder):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(step, args)
        row = {"row": cell.row, "column": cell.column, "mebibytes": f"{peak / 2**20:.1f}"}
        append_csv(folder / "memory.csv", _COLUMNS, [row])


def peak_of_recipe(recipe: Recipe, data: Description) -> int:
    """Measure a forward and a backward pass of a recipe's network on a batch of noise, in bytes."""
    network = build(recipe, data).train()
    assert recipe.image_size is not None
    images = torch.randn(recipe.batch, data.channels, recipe.image_size, recipe.image_size)
    return added_peak(lambda: network(images).square().mean().backward())
