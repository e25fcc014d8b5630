"""trainings.csv and tests.csv: what the trainings of a study reached, and the tests of those that were chosen."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from normfree.files.csv_tables import append_csv, read_csv, reading_rows
from normfree.studies.study import Cell, FinalTest, TrainingRow

_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str, int: int, float: float, float | None: lambda text: float(text) if text else None,
}  # fmt: skip

Row = TypeVar("Row", TrainingRow, FinalTest)


def fingerprint(recipe: Any) -> str:
    """Digest every field of a recipe: another value, or another default, is another training."""
    fields = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()[:12]


class RowTable(Generic[Row]):
    """A file of rows, one per training, added one by one; several processes may add."""

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.path = path
        self.kind: type[Row] = kind
        self._parsers = {name: _PARSERS[hint] for name, hint in get_type_hints(kind).items()}
        self._seen = (0, 0)  # time and size of the file when it was read last
        self._rows: dict[tuple[str, str, str], Row] = {}

    def rows(self) -> list[Row]:
        """Read all rows but a last line that was interrupted. Raises ValueError for a file of something else."""
        if self.path.exists():
            seen = self.path.stat().st_mtime_ns, self.path.stat().st_size
            if seen != self._seen:
                columns, texts = read_csv(self.path)
                if "top1" in columns and self.kind is TrainingRow:
                    raise ValueError(
                        f"{self.path} was made before studies validated: rename it, or choose another --out"
                    )
                with reading_rows(self.path):
                    parsed = [
                        self.kind(**{name: parse(row[name]) for name, parse in self._parsers.items()}) for row in texts
                    ]
                self._rows = {(row.recipe, row.row, row.column): row for row in reversed(parsed)}
                self._seen = seen
        return list(reversed(self._rows.values()))

    def find(self, cell: Cell, lr: float, seed: int) -> Row | None:
        """Return the row of this recipe, rate and seed, if it is there."""
        self.rows()
        wanted = fingerprint(dataclasses.replace(cell.recipe, lr=lr, seed=seed))
        return self._rows.get((wanted, cell.row, cell.column))

    def add(self, row: Row) -> None:
        """Add one row, on the disk when this returns."""
        values = {name: "" if value is None else value for name, value in dataclasses.asdict(row).items()}
        append_csv(self.path, list(values), [values])


class StudyTables:
    """The two files of a study's folder."""

    def __init__(self, folder: Path) -> None:
        self.trainings = RowTable(folder / "trainings.csv", TrainingRow)
        self.tests = RowTable(folder / "tests.csv", FinalTest)

    def tried(self, cell: Cell, seeds: int) -> dict[float, tuple[TrainingRow, ...]]:
        """Group the cell's trainings of the first seeds by learning rate, from the lowest on."""
        rates = sorted({t.lr for t in self.trainings.rows() if (t.row, t.column) == (cell.row, cell.column)})
        found = {
            lr: tuple(t for seed in range(seeds) if (t := self.trainings.find(cell, lr, seed)) is not None)
            for lr in rates
        }
        return {lr: trainings for lr, trainings in found.items() if trainings}
