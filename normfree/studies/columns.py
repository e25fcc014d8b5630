"""Columns beside the accuracies of a study's table: costs, the largest rate, the signal."""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from normfree.files.csv_tables import read_csv, reading_rows
from normfree.models.cost import multiply_accumulates
from normfree.signal.record import mean_to_variance
from normfree.sources import model_factory
from normfree.studies.peaks import read_peaks
from normfree.studies.study import Entry
from normfree.studies.trainings import fingerprint
from normfree.training import Recipe


def cost_columns(entries: Sequence[Entry], folder: Path) -> dict[str, dict[str, str]]:
    """List multiply-accumulates of an image, seconds of a training, and memory of a step, level by level."""
    peaks = read_peaks(folder)
    memory: dict[str, list[str]] = {}
    counts: dict[str, list[str]] = {}
    seconds: dict[str, list[str]] = {}
    for entry in entries:
        counts.setdefault(entry.cell.row, []).append(f"{recipe_macs(entry.cell.recipe) / 1e6:.0f}")
        times = [training.seconds for training in entry.trainings]
        seconds.setdefault(entry.cell.row, []).append(f"{statistics.median(times):.0f}" if times else "missing")
        peak = peaks.get((entry.cell.row, entry.cell.column))
        memory.setdefault(entry.cell.row, []).append("missing" if peak is None else f"{peak:.0f}")
    return {
        "million multiply-accumulates": {row: ", ".join(texts) for row, texts in counts.items()},
        "seconds to train": {row: ", ".join(texts) for row, texts in seconds.items()},
        "MiB that a step adds": {row: ", ".join(texts) for row, texts in memory.items()},
    }


def largest_rate_column(entries: Sequence[Entry], folder: Path) -> dict[str, dict[str, str]]:
    """Find the largest rate at which every training ends at half of the row's best accuracy at least."""
    found: dict[str, str] = {}
    for row in dict.fromkeys(entry.cell.row for entry in entries):
        mine = [entry for entry in entries if entry.cell.row == row and entry.trainings]
        best = max((accuracy for entry in mine for accuracy in entry.accuracies), default=0.0)
        good = [e.cell.recipe.lr for e in mine if len(e.tests) == len(e.trainings) and min(e.accuracies) >= best / 2]
        found[row] = f"{max(good):g}" if good else "none" if mine else "missing"
    return {"largest that trains": found}


def signal_columns(entries: Sequence[Entry], folder: Path) -> dict[str, dict[str, str]]:
    """List variance, and squared mean over variance, of the last block at the first, middle and last measured step."""
    variance: dict[str, str] = {}
    shift: dict[str, str] = {}
    for entry in entries:
        moments = read_signal(folder / "signal.csv", entry)
        if moments:
            last = [rows[-1] for rows in moments]
            variance[entry.cell.row] = ", ".join(f"{r['variance']:.2g}" for r in last)
            shift[entry.cell.row] = ", ".join(f"{mean_to_variance(r['squared_mean'], r['variance']):.2g}" for r in last)
    return {
        "last block's variance at start, middle, end": variance,
        "its squared mean over variance": shift,
    }


@functools.cache
def recipe_macs(recipe: Recipe) -> int:
    """Count multiply-accumulates of one training image, for 1000 classes."""
    with torch.device("meta"):
        model = model_factory(recipe.model)()
    assert recipe.image_size is not None
    return multiply_accumulates(model, 3, recipe.image_size)


def read_signal(path: Path, entry: Entry) -> list[list[dict[str, Any]]]:
    """Read what the monitor saw of an entry at its learning rate, block by block: first, middle and last such step."""
    if not path.exists() or entry.lr is None:
        return []
    wanted = fingerprint(replace(entry.cell.recipe, lr=entry.lr, seed=0))
    by_step: dict[int, list[dict[str, Any]]] = {}
    with reading_rows(path):
        for row in read_csv(path)[1]:
            if row["recipe"] == wanted:
                numbers = {name: float(row[name]) for name in ("depth", "variance", "squared_mean")}
                by_step.setdefault(int(row["step"]), []).append(numbers)
    steps = sorted(by_step)
    return [by_step[steps[place]] for place in (0, len(steps) // 2, -1)] if steps else []
