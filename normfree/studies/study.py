"""What a study is made of, and the one file that keeps what its trainings reached."""

import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from normfree.training import Recipe


@dataclass(frozen=True)
class Cell:
    """One entry of a study's table: a recipe, trained once per seed."""

    row: str
    column: str
    recipe: Recipe


@dataclass(frozen=True)
class Training:
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
    """What the trainings of a cell reached at the learning rate that served it best."""

    cell: Cell
    lr: float | None  # None where nothing has run
    trainings: tuple[Training, ...] = ()

    @property
    def accuracies(self) -> list[float]:
        """In percent of the test set, of the trainings that did not fail."""
        return [training.top1 for training in self.trainings if training.top1 is not None]


Beside = Callable[[Sequence[Entry], Path], Mapping[str, Mapping[str, str]]]
"""More columns of a study's table, out of its entries and its folder: title -> row -> text."""


@dataclass(frozen=True)
class Study:
    """What is compared, and what the paper claims of it."""

    name: str
    claim: str
    across: str  # what the columns are
    cells: tuple[Cell, ...]
    rates: tuple[float, ...] = ()  # learning rates that each cell chooses from; else the recipe's
    beside: Beside = lambda entries, folder: {}
    over: tuple[Literal["column", "macs", "seconds"], ...] = ("column",)  # horizontal axes of the chart


def fingerprint(recipe: Recipe) -> str:
    """Equal for recipes that train alike: of the fields that are not the class's defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(recipe)}
    chosen = {name: value for name, value in dataclasses.asdict(recipe).items() if value != defaults[name]}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


class Ledger:
    """trainings.csv: a row per training, added when it is over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = (0, 0)  # when the file was read last: its time and size
        self._found: dict[tuple[str, str, str], Training] = {}

    def find(self, cell: Cell, lr: float, seed: int) -> Training | None:
        """The training of this recipe, rate and seed."""
        if self.path.exists():
            seen = self.path.stat().st_mtime_ns, self.path.stat().st_size
            if seen != self._seen:
                self._found = {(t.recipe, t.row, t.column): t for t in reversed(self.read())}
                self._seen = seen
        wanted = fingerprint(dataclasses.replace(cell.recipe, lr=lr, seed=seed))
        return self._found.get((wanted, cell.row, cell.column))

    def read(self) -> list[Training]:
        """All of them, without a last line that is not whole. Raises ValueError for a file that is none of ours."""
        if not self.path.exists():
            return []
        try:
            text = self.path.read_text(encoding="utf-8")
            return [
                Training(
                    row["recipe"], row["row"], row["column"], float(row["lr"]), int(row["seed"]),
                    float(row["top1"]) if row["top1"] else None, float(row["seconds"]), row["error"],
                )
                for row in csv.DictReader(text[: _whole(text)].splitlines())
            ]  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} holds no trainings of a study ({error!r})") from error

    def add(self, training: Training) -> None:
        """One more, on the disk when this returns."""
        values = dataclasses.asdict(training)
        values |= {
            "top1": "" if training.top1 is None else f"{training.top1:.4f}",
            "seconds": f"{training.seconds:.1f}",
        }
        held = self.path.read_bytes() if self.path.exists() else b""
        if _whole(held) < len(held):
            os.truncate(self.path, _whole(held))
        new = not _whole(held)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(values), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(values)
            file.flush()
            os.fsync(file.fileno())


def _whole(text: str | bytes) -> int:
    """Length of its whole lines: the last one may have been interrupted."""
    return 1 + (text.rfind("\n") if isinstance(text, str) else text.rfind(b"\n"))
