"""The runner of a study: its cells, one training after the other, each tested once."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from normfree.errors import NotFiniteError, SingleValueError, WritingError
from normfree.files.csv_tables import append_csv, read_csv
from normfree.signal.record import STATISTICS
from normfree.studies.learning_rates import chosen_rate, next_rate_and_seed
from normfree.studies.peaks import measure_peak, peak_of_recipe
from normfree.studies.results import write_results
from normfree.studies.study import Cell, Entry, FinalTest, Study, TrainingRow
from normfree.studies.trainings import StudyTables, fingerprint
from normfree.training import Recipe, evaluate_run, train
from normfree.training.data.datasets import Description, load
from normfree.training.processes import gather, shared_processes


class Trained(NamedTuple):
    """Result of a training: percent of the validation images, or None and the reason why it failed."""

    validation: float | None
    seconds: float
    error: str = ""


class Work:
    """Way in which a study trains and tests; a recipe is a cell's, with its rate and seed."""

    writes = True  # whether this process writes results

    def train(self, cell: Cell, recipe: Any) -> Trained | None:
        """Train; None where that was interrupted."""
        raise NotImplementedError

    def test(self, cell: Cell, recipe: Any) -> tuple[float, float] | None:
        """Return accuracy and balanced accuracy of a training on the test set, in percent; None where interrupted."""
        raise NotImplementedError

    def stop(self) -> bool:
        """Wait until the other processes are as far; tell whether any was asked to stop."""
        return False


def run_cells(
    study: Study,
    out: Path,
    work: Work,
    *,
    seeds: int,
    only: Sequence[str] = (),
    on_message: Callable[[str], None] = lambda text: None,
) -> list[Entry]:
    """Train every cell that `out` does not hold yet, and write the results so far after each.

    A cell's learning rate is that of the best mean over all seeds, on the validation images. The first seed looks for
    it. The others then train at its best rate; where their mean falls below what the first seed reached at another
    rate, they train there too, unless the study chooses by the first seed alone. Then, once, what was trained at that
    rate is tested on the test set.

    `only` names the rows and columns whose cells are trained, so that several processes can share the work; where it
    names no row, or no column, all of them are. `on_message` is called with what is begun.

    Raises ValueError for a row or column that the study does not have.
    """
    tables = StudyTables(out)
    for cell in _chosen(study, only):
        if not _trained(study, cell, work, tables, seeds, on_message):
            on_message("interrupted: the same command goes on")
            break
        if work.writes:
            try:
                write_results(study, out, read_entries(study, out, seeds))
            except WritingError as error:  # as where another process, which shares the work, writes them
                on_message(str(error))
    return read_entries(study, out, seeds)


def _trained(
    study: Study, cell: Cell, work: Work, tables: StudyTables, seeds: int, on_message: Callable[[str], None]
) -> bool:
    """Train one cell, and test it; tell whether neither was interrupted."""
    while (todo := next_rate_and_seed(study.rates, cell, tables, seeds)) is not None:
        recipe = replace(cell.recipe, lr=todo[0], seed=todo[1])
        on_message(f"{_name(study, cell)}, rate {recipe.lr:g}, seed {recipe.seed}")
        trained = work.train(cell, recipe)
        if trained is None:
            return False
        if work.writes:
            reached = None if trained.validation is None else round(trained.validation, 4)
            named = fingerprint(recipe), cell.row, cell.column, recipe.lr, recipe.seed
            tables.trainings.add(TrainingRow(*named, reached, round(trained.seconds, 1), trained.error))
        if work.stop():
            return False
    return _tested(study, cell, work, tables, seeds, on_message)


def _name(study: Study, cell: Cell) -> str:
    return f"{cell.row}, {study.column_title} {cell.column}"


def _tested(
    study: Study, cell: Cell, work: Work, tables: StudyTables, seeds: int, on_message: Callable[[str], None]
) -> bool:
    """Test the cell's trainings at the rate that is chosen, each once; tell whether that was not interrupted."""
    lr = chosen_rate(study.rates, cell, tables.tried(cell, seeds))
    for recipe in [replace(cell.recipe, lr=lr, seed=seed) for seed in range(seeds)]:
        training = tables.trainings.find(cell, lr, recipe.seed)
        if training is None or training.validation is None or tables.tests.find(cell, lr, recipe.seed) is not None:
            continue
        on_message(f"{_name(study, cell)}, rate {lr:g}, seed {recipe.seed}: test")
        found = work.test(cell, recipe)
        if found is None:
            return False
        if work.writes:
            named = fingerprint(recipe), cell.row, cell.column, lr, recipe.seed
            tables.tests.add(FinalTest(*named, round(found[0], 4), round(found[1], 4)))
        if work.stop():
            return False
    return True


def run_study(
    study: Study,
    out: Path,
    *,
    seeds: int,
    only: Sequence[str] = (),
    on_message: Callable[[str], None] = lambda text: None,
) -> list[Entry]:
    """Do what `run_cells` says with trainings of recipes, each in a folder of `out`.

    One that was interrupted goes on. Under `torchrun` or `accelerate launch` every training is that of all processes,
    and the first one writes.

    Raises ValueError for a row or column that the study does not have.
    """
    with shared_processes() as processes:
        speak = on_message if processes.is_main_process else lambda text: None
        work = _OfRecipes(out, processes, memory="memory" in study.chart_axes)
        return run_cells(study, out, work, seeds=seeds, only=only, on_message=speak)


class _OfRecipes(Work):
    """Trainings by the engine, on one of its processes."""

    def __init__(self, out: Path, processes: Any, *, memory: bool) -> None:
        self.out = out
        self.processes = processes
        self.memory = memory  # whether that of a step is measured
        self.writes = bool(processes.is_main_process)
        self.load = functools.cache(load)
        self.stop_requested = False

    def _folder(self, cell: Cell, recipe: Recipe) -> Path:
        words = f"{cell.row} {cell.column}".replace("/", " ").split()
        return self.out / "runs" / "_".join(words) / f"lr_{recipe.lr:g}_seed_{recipe.seed}_{fingerprint(recipe)}"

    def train(self, cell: Cell, recipe: Recipe) -> Trained | None:
        """Train one."""
        folder = self._folder(cell, recipe)
        start = time.perf_counter()
        try:
            result = train(recipe, folder, resume="auto", quiet=True, data=self.load(recipe.data))
            if not result.finished:
                return None
            assert result.accuracy is not None
            self.stop_requested = result.stop_requested
            trained = Trained(result.accuracy.top1, result.seconds)
        except (NotFiniteError, SingleValueError) as failure:
            trained = Trained(None, time.perf_counter() - start, str(failure).split(";")[0])
        if self.writes and recipe.signal_every and recipe.seed == 0:
            named = {"recipe": fingerprint(recipe), "row": cell.row, "column": cell.column, "lr": recipe.lr}
            _keep_signal(folder / "signal.csv", self.out / "signal.csv", named)
        return trained

    def test(self, cell: Cell, recipe: Recipe) -> tuple[float, float] | None:
        """Test one that has been trained, here or elsewhere."""
        folder, data = self._folder(cell, recipe), self.load(recipe.data)
        weights = folder / "model.safetensors"
        if not weights.exists():
            train(recipe, folder, resume="auto", quiet=True, data=data)
        if not weights.exists():
            return None
        if self.memory and self.writes:
            described = Description(data.classes, data.mean, data.std, data.names)
            measure_peak(self.out, cell, peak_of_recipe, recipe, described)
        found = evaluate_run(folder, data=data, trusted_model=recipe.model)
        return found.top1, found.balanced

    def stop(self) -> bool:
        """Wait for the other processes, which read what has been trained from one file."""
        self.processes.wait_for_everyone()
        return any(gather(self.stop_requested))


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
    """Append what a run's monitor measured of the signal, block by block, to the study's file."""
    columns = ("step", "depth", "name", "stage", *STATISTICS)
    rows = [row for row in read_csv(source)[1] if row["kind"] in ("join", "weight layer")]
    if rows:
        append_csv(target, [*named, *columns], [{**named, **{name: row[name] for name in columns}} for row in rows])
