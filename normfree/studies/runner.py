"""The runner of a study: its cells, one training after the other, each tested once."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from normfree.errors import NotFiniteError, SingleValueError
from normfree.files.csv_tables import append_csv, read_csv
from normfree.studies.learning_rates import chosen_rate, next_rate_and_seed
from normfree.studies.results import write_results
from normfree.studies.study import Cell, Entry, FinalTest, Study, TrainingRow
from normfree.studies.trainings import StudyTables, fingerprint
from normfree.training import Recipe, evaluate_run, train
from normfree.training.data.datasets import load
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

    A cell's learning rate is that of the best mean over all seeds, on the validation images. The first seed looks for
    it. The others then train at its best rate; where their mean falls below what the first seed reached at another
    rate, they train there too, unless the study chooses by the first seed alone. Then, once, what was trained at that
    rate is tested on the test set. A training that was interrupted goes on. Under `torchrun` or `accelerate launch`
    every training is that of all processes, and the first one writes.

    `only` names the rows and columns whose cells are trained, so that several processes can share the work; where it
    names no row, or no column, all of them are. `on_message` is called with what is begun.

    Raises ValueError for a row or column that the study does not have.
    """
    with shared_processes() as processes:
        runner = _Runner(study, out, seeds, on_message, processes)
        for cell in _chosen(study, only):
            if not runner.run(cell):
                runner.say("interrupted: the same command goes on")
                break
            if processes.is_main_process:
                write_results(study, out, read_entries(study, out, seeds))
    return read_entries(study, out, seeds)


class _Runner:
    """Trains and tests the cells of one study, on one of its processes."""

    def __init__(self, study: Study, out: Path, seeds: int, on_message: Callable[[str], None], processes: Any) -> None:
        self.study = study
        self.out = out
        self.seeds = seeds
        self.on_message = on_message
        self.processes = processes
        self.tables = StudyTables(out)
        self.load = functools.cache(load)

    def say(self, text: str) -> None:
        if self.processes.is_main_process:
            self.on_message(text)

    def run(self, cell: Cell) -> bool:
        """Train and test one cell; tell whether it was not interrupted."""
        name = f"{cell.row}, {self.study.column_title} {cell.column}"
        while (todo := next_rate_and_seed(self.study.rates, cell, self.tables, self.seeds)) is not None:
            lr, seed = todo
            self.say(f"{name}, rate {lr:g}, seed {seed}")
            if not self._train(cell, replace(cell.recipe, lr=lr, seed=seed)):
                return False
        lr = chosen_rate(self.study.rates, cell, self.tables.tried(cell, self.seeds))
        for seed in range(self.seeds):
            training = self.tables.trainings.find(cell, lr, seed)
            if training is None or training.validation is None or self.tables.tests.find(cell, lr, seed) is not None:
                continue
            self.say(f"{name}, rate {lr:g}, seed {seed}: test")
            if not self._test(cell, replace(cell.recipe, lr=lr, seed=seed)):
                return False
        return True

    def _folder(self, cell: Cell, recipe: Recipe) -> Path:
        words = f"{cell.row} {cell.column}".replace("/", " ").split()
        return self.out / "runs" / "_".join(words) / f"lr_{recipe.lr:g}_seed_{recipe.seed}_{fingerprint(recipe)}"

    def _train(self, cell: Cell, recipe: Recipe) -> bool:
        """Train one; tell whether the study is to go on."""
        folder = self._folder(cell, recipe)
        start = time.perf_counter()
        seconds = 0.0
        reached: float | None = None
        error, stop_requested = "", False
        try:
            result = train(recipe, folder, resume="auto", quiet=True, data=self.load(recipe.data))
            if not result.finished:
                return False
            assert result.accuracy is not None
            reached, stop_requested, seconds = result.accuracy.top1, result.stop_requested, result.seconds
        except (NotFiniteError, SingleValueError) as failure:
            error, seconds = str(failure), time.perf_counter() - start
        if self.processes.is_main_process:
            if recipe.signal_every and recipe.seed == 0:
                named = {"recipe": fingerprint(recipe), "row": cell.row, "column": cell.column, "lr": recipe.lr}
                _keep_signal(folder / "signal.csv", self.out / "signal.csv", named)
            self.tables.trainings.add(
                TrainingRow(
                    fingerprint(recipe), cell.row, cell.column, recipe.lr, recipe.seed,
                    None if reached is None else round(reached, 4), round(seconds, 1), error.split(";")[0],
                )
            )  # fmt: skip
        self.processes.wait_for_everyone()  # all read what has been trained from one file
        return not any(gather(stop_requested))

    def _test(self, cell: Cell, recipe: Recipe) -> bool:
        """Test one that has been trained; tell whether the study is to go on."""
        folder, data = self._folder(cell, recipe), self.load(recipe.data)
        if not (folder / "model.safetensors").exists():  # trained elsewhere
            train(recipe, folder, resume="auto", quiet=True, data=data)
        if not (folder / "model.safetensors").exists():
            return False
        found = evaluate_run(folder, data=data, trusted_model=recipe.model)
        if self.processes.is_main_process:
            self.tables.tests.add(
                FinalTest(
                    fingerprint(recipe), cell.row, cell.column, recipe.lr, recipe.seed, round(found.top1, 4),
                    round(found.balanced, 4),
                )
            )  # fmt: skip
        self.processes.wait_for_everyone()
        return True


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
    tables = StudyTables(out)
    found = []
    for cell in study.cells:
        tried = tables.tried(cell, seeds)
        if not tried:
            found.append(Entry(cell, None))
            continue
        lr = chosen_rate(study.rates, cell, tried)
        tests = (tables.tests.find(cell, lr, training.seed) for training in tried[lr])
        found.append(Entry(cell, lr, tried[lr], tuple(test for test in tests if test is not None)))
    return found


def _keep_signal(source: Path, target: Path, named: Mapping[str, object]) -> None:
    """Append what a run's monitor measured to the study's file."""
    columns, rows = read_csv(source)
    if rows:
        append_csv(target, [*named, *columns], [{**named, **row} for row in rows])
