"""The parts of a study: cells, what their trainings reached, and the claim that they are to show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Cell:
    """Place in a study's table: a recipe, trained once per seed."""

    row: str
    column: str
    recipe: Any  # Recipe, or another frozen dataclass with lr and seed that decides all of a training


@dataclass(frozen=True)
class TrainingRow:
    """One training of a cell, over: well, or with a loss that was not finite."""

    recipe: str  # `fingerprint`
    row: str
    column: str
    lr: float
    seed: int
    validation: float | None  # percent of the validation images; None where it failed
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class FinalTest:
    """The one test of a training that its cell has chosen."""

    recipe: str  # `fingerprint`
    row: str
    column: str
    lr: float
    seed: int
    top1: float  # percent of the test set
    balanced: float  # the same, the mean over the classes


@dataclass(frozen=True)
class Entry:
    """Trainings of a cell at the learning rate that served it best, and their tests once all of them are there."""

    cell: Cell
    lr: float | None  # None where nothing has run
    trainings: tuple[TrainingRow, ...] = ()
    tests: tuple[FinalTest, ...] = ()

    @property
    def failed(self) -> int:
        """Number of trainings that failed."""
        return sum(training.validation is None for training in self.trainings)

    @property
    def accuracies(self) -> list[float]:
        """Accuracies of the tests, in percent."""
        return [test.top1 for test in self.tests]

    @property
    def balanced(self) -> list[float]:
        """Balanced accuracies of the tests, in percent."""
        return [test.balanced for test in self.tests]


@dataclass(frozen=True)
class Rates:
    """Learning rates (at a batch of 256) that a cell chooses from: `first` times any power of `factor`."""

    first: float
    factor: float = 2.0
    by_first_seed: bool = False  # else by the mean over all seeds


ExtraColumns = Callable[[Sequence[Entry], Path], Mapping[str, Mapping[str, str]]]
"""Function that makes more columns of a study's table, out of its entries and its folder: title -> row -> text."""


def _no_extra_columns(entries: Sequence[Entry], folder: Path) -> Mapping[str, Mapping[str, str]]:
    return {}


@dataclass(frozen=True)
class Study:
    """Networks that are compared, and the paper's claim about them."""

    name: str
    claim: str
    column_title: str
    cells: tuple[Cell, ...]
    rates: Rates | None = None  # None: the recipe's own rate
    extra_columns: ExtraColumns = _no_extra_columns
    balanced: bool = False  # show balanced accuracies too
    chart_axes: tuple[Literal["column", "macs", "seconds", "memory"], ...] = ("column",)  # a panel for each
