"""trainings.csv: the one file that keeps what the trainings of a study reached."""

import dataclasses
import hashlib
import json
from pathlib import Path

from normfree.files.csv_tables import append_csv, read_csv, reading_rows
from normfree.studies.study import Cell, TrainingRow
from normfree.training import Recipe


def fingerprint(recipe: Recipe) -> str:
    """Digest every field of a recipe: another value, or another default, is another training."""
    fields = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()[:12]


class TrainingTable:
    """Rows of trainings.csv, one per training, added when it is over; several processes may add."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = (0, 0)  # time and size of the file when it was read last
        self._found: dict[tuple[str, str, str], TrainingRow] = {}

    def find(self, cell: Cell, lr: float, seed: int) -> TrainingRow | None:
        """Return the training of this recipe, rate and seed, if it is there."""
        if self.path.exists():
            seen = self.path.stat().st_mtime_ns, self.path.stat().st_size
            if seen != self._seen:
                self._found = {(t.recipe, t.row, t.column): t for t in reversed(self.read())}
                self._seen = seen
        wanted = fingerprint(dataclasses.replace(cell.recipe, lr=lr, seed=seed))
        return self._found.get((wanted, cell.row, cell.column))

    def read(self) -> list[TrainingRow]:
        """Read all rows but a last line that was interrupted. Raises ValueError for a file of something else."""
        _, rows = read_csv(self.path)
        with reading_rows(self.path):
            return [
                TrainingRow(
                    row["recipe"], row["row"], row["column"], float(row["lr"]), int(row["seed"]),
                    float(row["top1"]) if row["top1"] else None, float(row["seconds"]), row["error"],
                )
                for row in rows
            ]  # fmt: skip

    def add(self, training: TrainingRow) -> None:
        """Add one row, on the disk when this returns."""
        values = dataclasses.asdict(training)
        values |= {
            "top1": "" if training.top1 is None else f"{training.top1:.4f}",
            "seconds": f"{training.seconds:.1f}",
        }
        append_csv(self.path, list(values), [values])
