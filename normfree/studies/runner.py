"""The runner of a study: its cells, one training after the other."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from normfree.errors import NotFiniteError, SingleValueError
from normfree.files.csv_tables import append_csv, read_csv
from normfree.studies.results import write_results
from normfree.studies.study import Cell, Entry, Study, TrainingRow
from normfree.studies.trainings import TrainingTable, fingerprint
from normfree.training import Recipe, train
from normfree.training.data.datasets import Data, load
from normfree.training.processes import gather, shared_processes


def run_study(
    study: Study,
    out: Path,
    *,
    seeds: int,
    only: Sequence[str] = (),
    on_message: Callable[[str], None] = lambda text: None,
) -> list[Entry]:
    """Train every cell that `out` does not hold yet, and write the results so far after each.

    A cell's learning rate is that of the best mean over all seeds. The first seed looks for it. The others then train
    at its best rate; where their mean falls below what the first seed reached at another rate, they train there too. A
    training that was interrupted goes on. Under `torchrun` or `accelerate launch` every training is that of all
    processes, and the first one writes.

    `only` names the rows and columns whose cells are trained, so that several processes can share the work; where it
    names no row, or no column, all of them are. `on_message` is called with what is begun.

    Raises ValueError for a row or column that the study does not have.
    """
    table = TrainingTable(out / "trainings.csv")
    loaded = functools.cache(load)
    with shared_processes() as processes:
        for cell in _chosen(study, only):
            while (todo := _next_rate_and_seed(study, cell, table, seeds)) is not None:
                lr, seed = todo
                if processes.is_main_process:
                    on_message(f"{cell.row}, {study.column_title} {cell.column}, rate {lr:g}, seed {seed}")
                recipe = replace(cell.recipe, lr=lr, seed=seed)
                if not _train(out, recipe, loaded(recipe.data), cell, table, processes):
                    if processes.is_main_process:
                        on_message("interrupted: the same command goes on")
                    return read_entries(study, out, seeds)
            if processes.is_main_process:
                write_results(study, out, read_entries(study, out, seeds))
    return read_entries(study, out, seeds)


def _chosen(study: Study, only: Sequence[str]) -> list[Cell]:
    chosen = list(study.cells)
    rows, columns = ({getattr(cell, axis): None for cell in study.cells} for axis in ("row", "column"))
    for name in only:
        if name not in rows and name not in columns:
            raise ValueError(f"{study.name} has no {name!r}; it has {', '.join(columns)}, and {', '.join(rows)}")
    for axis, names in (("row", rows.keys() & only), ("column", columns.keys() & only)):
        chosen = [cell for cell in chosen if not names or getattr(cell, axis) in names]
    return chosen


def read_entries(study: Study, out: Path, seeds: int) -> list[Entry]:
    """Read what is there so far, in the order of the cells: the best of the rates that most seeds have trained at."""
    table = TrainingTable(out / "trainings.csv")
    found = []
    for cell in study.cells:
        tried = _tried(study, cell, table, seeds)
        most = max(map(len, tried.values()), default=0)
        lr = _best({lr: trainings for lr, trainings in tried.items() if len(trainings) == most})
        found.append(Entry(cell, lr, () if lr is None else tried[lr]))
    return found


def _next_rate_and_seed(study: Study, cell: Cell, table: TrainingTable, seeds: int) -> tuple[float, int] | None:
    """Choose the learning rate and the seed of the cell's next training; None where all have run.

    The first seed tries rates from the middle one downwards, or else upwards, until both neighbours of the best are
    known. Downwards first: beyond a rate that fails may be one that merely kills the network.
    """
    rates = _rates(study, cell)
    tried = _tried(study, cell, table, seeds)
    best = _best(tried)
    if best is None:
        return rates[len(rates) // 2], 0
    place = rates.index(best)
    for lr in (*rates[max(place - 1, 0) : place], *rates[place + 1 : place + 2]):
        if lr not in tried:
            return lr, 0
    return next(((best, seed) for seed in range(1, seeds) if table.find(cell, best, seed) is None), None)


def _rates(study: Study, cell: Cell) -> tuple[float, ...]:
    return study.rates or (cell.recipe.lr,)


def _tried(study: Study, cell: Cell, table: TrainingTable, seeds: int) -> dict[float, tuple[TrainingRow, ...]]:
    """Group the cell's trainings by learning rate."""
    found = {
        lr: tuple(t for seed in range(seeds) if (t := table.find(cell, lr, seed)) is not None)
        for lr in _rates(study, cell)
    }
    return {lr: trainings for lr, trainings in found.items() if trainings}


def _best(tried: Mapping[float, Sequence[TrainingRow]]) -> float | None:
    """Choose the rate of the highest mean accuracy, a failure counting as -1; the lower one of equals."""
    means = {lr: fmean(-1.0 if t.top1 is None else t.top1 for t in tried[lr]) for lr in sorted(tried)}
    return max(means, key=means.__getitem__) if means else None


def _train(out: Path, recipe: Recipe, data: Data, cell: Cell, table: TrainingTable, processes: Any) -> bool:
    """Train one; tell whether the study is to go on, that is, was not interrupted."""
    words = f"{cell.row} {cell.column}".replace("/", " ").split()
    folder = out / "runs" / "_".join(words) / f"lr_{recipe.lr:g}_seed_{recipe.seed}_{fingerprint(recipe)}"
    start = time.perf_counter()
    seconds = 0.0
    top1: float | None = None
    error, stop_requested = "", False
    try:
        result = train(recipe, folder, resume="auto", quiet=True, data=data)
        if not result.finished:
            return False
        assert result.accuracy is not None
        top1, stop_requested, seconds = result.accuracy.top1, result.stop_requested, result.seconds
    except (NotFiniteError, SingleValueError) as failure:
        error, seconds = str(failure), time.perf_counter() - start
    if processes.is_main_process and recipe.signal_every and recipe.seed == 0:
        named = {"recipe": fingerprint(recipe), "row": cell.row, "column": cell.column, "lr": recipe.lr}
        _keep_signal(folder / "signal.csv", out / "signal.csv", named)
    training = TrainingRow(
        fingerprint(recipe), cell.row, cell.column, recipe.lr, recipe.seed, top1, seconds, error.split(";")[0]
    )
    if processes.is_main_process:
        table.add(training)
    processes.wait_for_everyone()  # all read what has been trained from one file
    return not any(gather(stop_requested))


def _keep_signal(source: Path, target: Path, named: Mapping[str, object]) -> None:
    """Append what a run's monitor measured to the study's file."""
    columns, rows = read_csv(source)
    if rows:
        append_csv(target, [*named, *columns], [{**named, **row} for row in rows])
