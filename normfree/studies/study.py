"""The parts of a study: cells, what their trainings reached, and the claim that they are to show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from normfree.training import Recipe


@dataclass(frozen=True)
class Cell:
    """Place in a study's table: a recipe, trained once per seed."""

    row: str
    column: str
    recipe: Recipe


@dataclass(frozen=True)
class TrainingRow:
    """One training of a cell, over: well, or with a loss that was not finite."""

    recipe: str  # `fingerprint`
    row: str
    column: str
    lr: float
    seed: int
    top1: float | None  # percent of the test set; None where it failed
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Entry:
    """Trainings of a cell at the learning rate that served it best."""

    cell: Cell
    lr: float | None  # None where nothing has run
    trainings: tuple[TrainingRow, ...] = ()

    @property
    def accuracies(self) -> list[float]:
        """Accuracies, in percent of the test set, of the trainings that did not fail."""
        return [training.top1 for training in self.trainings if training.top1 is not None]


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
    rates: tuple[float, ...] = ()  # learning rates that each cell chooses from; else the recipe's
    extra_columns: ExtraColumns = _no_extra_columns
    chart_axes: tuple[Literal["column", "macs", "seconds"], ...] = ("column",)  # a panel for each
