"""Runs the cells of a study, one training each, and sets them out as a table, a chart and a page."""

import csv
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normfree.errors import TrainingError
from normfree.training import Recipe, train
from normfree.training.curves import draw_study


@dataclass(frozen=True)
class Cell:
    """One entry of a study's table: a recipe, trained once per seed."""

    row: str
    column: str
    recipe: Recipe


@dataclass(frozen=True)
class Study:
    """What is compared, and what the paper claims of it."""

    name: str
    claim: str
    across: str  # what the columns are
    cells: tuple[Cell, ...]
    rates: tuple[float, ...] = ()  # learning rates to choose from, per cell, by the first seed; else the recipe's


@dataclass(frozen=True)
class Entry:
    """What a cell's trainings reached, in percent of the test set; a training that failed has none."""

    row: str
    column: str
    lr: float | None  # chosen; None where nothing has run
    accuracies: tuple[float, ...]
    failed: int
    seconds: float

    def __str__(self) -> str:
        if self.lr is None:
            return "missing"
        if not self.accuracies:
            return "fails"
        deviation = f" ± {statistics.stdev(self.accuracies):.2f}" if len(self.accuracies) > 1 else ""
        return f"{statistics.fmean(self.accuracies):.2f}{deviation}" + (f" ({self.failed} failed)" * bool(self.failed))


def run(study: Study, out: Path, *, seeds: int, said: Callable[[str], None] = lambda text: None) -> list[Entry]:
    """Train every cell that `out` does not hold yet, and write the results so far after each.

    Trainings that were interrupted go on. `said` is told what is begun.
    """
    for cell in study.cells:
        for seed in range(seeds):
            rates = study.rates or (cell.recipe.lr,)
            for lr in rates if seed == 0 else (_best_rate(out, cell, rates) or rates[0],):
                if _result(out, cell, lr, seed) is None:
                    said(f"{cell.row}, {study.across} {cell.column}, rate {lr:g}, seed {seed}")
                    if not _train(out, replace(cell.recipe, lr=lr, seed=seed), cell):
                        return entries(study, out, seeds)
        write(study, out, seeds)
    return entries(study, out, seeds)


def entries(study: Study, out: Path, seeds: int) -> list[Entry]:
    """What is there so far, in the order of the cells."""
    found = []
    for cell in study.cells:
        lr = _best_rate(out, cell, study.rates or (cell.recipe.lr,))
        results = [r for seed in range(seeds) if lr is not None and (r := _result(out, cell, lr, seed)) is not None]
        accuracies = tuple(r["top1"] for r in results if r["top1"] is not None)
        failed, seconds = len(results) - len(accuracies), sum(r["seconds"] for r in results)
        found.append(Entry(cell.row, cell.column, lr, accuracies, failed, seconds))
    return found


def table(study: Study, found: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row of texts for each row of the study."""
    columns = list(dict.fromkeys(cell.column for cell in study.cells))
    texts = {(entry.row, entry.column): str(entry) for entry in found}
    rows = [[row, *(texts.get((row, c), "") for c in columns)] for row in dict.fromkeys(e.row for e in found)]
    return [study.across, *columns], rows


def write(study: Study, out: Path, seeds: int) -> None:
    """results.csv, chart.png and table.md of what is there so far."""
    found = entries(study, out, seeds)
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row", "column", "lr", "mean", "accuracies", "failed", "seconds"))
        for e in found:
            mean = f"{statistics.fmean(e.accuracies):.3f}" if e.accuracies else ""
            accuracies = " ".join(f"{value:.3f}" for value in e.accuracies)
            writer.writerow(
                (e.row, e.column, "" if e.lr is None else e.lr, mean, accuracies, e.failed, f"{e.seconds:.0f}")
            )
    titles, rows = table(study, found)
    lines = ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    points = [
        {"row": e.row, "column": e.column, "accuracy": value, "seed": seed}
        for e in found
        for seed, value in enumerate(e.accuracies)
    ]
    if points:
        draw_study(points, titles[1:], study.across, out / "chart.png")


def _folder(out: Path, cell: Cell, lr: float, seed: int) -> Path:
    words = f"{cell.row} {cell.column}".replace("/", " ").split()
    return out / "runs" / "_".join(words) / f"lr_{lr:g}_seed_{seed}"


def _result(out: Path, cell: Cell, lr: float, seed: int) -> dict[str, Any] | None:
    path = _folder(out, cell, lr, seed) / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def _best_rate(out: Path, cell: Cell, rates: Sequence[float]) -> float | None:
    """Of those that the first seed has run: the most accurate; a failed one only where all failed."""
    known = [(result["top1"], lr) for lr in rates if (result := _result(out, cell, lr, 0)) is not None]
    return max(known, key=lambda pair: -1.0 if pair[0] is None else pair[0])[1] if known else None


def _train(out: Path, recipe: Recipe, cell: Cell) -> bool:
    """Whether it ended, well or by a loss that is not finite; False where it was interrupted."""
    folder = _folder(out, cell, recipe.lr, recipe.seed)
    start = time.perf_counter()
    top1: float | None = None
    error = ""
    try:
        result = train(recipe, folder, resume="auto", quiet=True)
        if not result.finished:
            return False
        assert result.accuracy is not None
        top1 = result.accuracy.top1
    except TrainingError as failure:
        if "not finite" not in str(failure):
            raise
        error = str(failure)
    described = {"top1": top1, "seconds": time.perf_counter() - start, "error": error}
    (folder / "result.json").write_text(json.dumps(described, indent=1) + "\n")
    return True
