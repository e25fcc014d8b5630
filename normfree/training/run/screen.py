"""What a training says of itself: metrics.csv, trackers, and a line or a bar on the screen."""

import contextlib
import csv
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from normfree.errors import TrainingError
from normfree.files import replacing

COLUMNS = ("step", "epoch", "kind", "loss", "top1", "top5", "lr", "gradient_norm", "images_per_second")
"""Of metrics.csv; kind is train, eval or eval_ema."""


class Table:
    """A .csv file that grows by rows, and can be cut back to a step."""

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.file: TextIO | None = None

    def cut_back(
        self, step: int, including: Callable[[Mapping[str, str]], bool] = lambda row: True
    ) -> list[dict[str, str]]:
        """Keep the rows before `step` and those at it that are `including`, whole lines only, and go on after them.

        They are returned. Raises TrainingError where the file cannot be written.
        """
        kept = []
        if self.path.exists():
            rows = csv.DictReader(self.path.read_text().splitlines())
            if rows.fieldnames and tuple(rows.fieldnames) != self.columns:
                raise TrainingError(f"{self.path} is no file of a training, or of another one: choose another place")
            for row in rows:
                whole = None not in row.values()
                if whole and (int(row["step"]) < step or (int(row["step"]) == step and including(row))):
                    kept.append(row)
        with replacing(self.path) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        with self._explained():
            self.file = self.path.open("a", newline="")
        return kept

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error}") from error

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows and bring them to the disk, so that they outlive this process."""
        assert self.file is not None
        with self._explained():
            csv.DictWriter(self.file, self.columns, lineterminator="\n").writerows(rows)
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Nothing is added after this."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # of a full disk, which was told when the row was added
                self.file.close()
            self.file = None


class Screen:
    """A live bar on a terminal; plain lines elsewhere, one for each row that is logged."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.console = Console(stderr=True)
        self.quiet = quiet
        self.live = self.console.is_terminal and not quiet
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
        )  # fmt: skip
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.live)
        self.task = self.progress.add_task("training", total=total, words="")

    def __enter__(self) -> "Screen":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, done: int) -> None:
        """So many optimizer steps are done."""
        self.progress.update(self.task, completed=done)

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics.csv."""
        words = _words(row)
        if row["kind"] == "train":
            self.progress.update(self.task, description=f"epoch {row['epoch'] + 1}", words=words)
            if not self.live:
                self.say(f"step {row['step']}: {words}")
        else:
            self.say(f"epoch {row['epoch'] + 1}, {'test' if row['kind'] == 'eval' else 'test, averaged'}: {words}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.live:
            self.progress.console.print(text, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _words(row: Mapping[str, Any]) -> str:
    formats = {
        "loss": "loss {:.4f}", "top1": "top-1 {:.2f} %", "top5": "top-5 {:.2f} %", "lr": "lr {:.3g}",
        "images_per_second": "{:.0f} images/s",
    }  # fmt: skip
    return ", ".join(text.format(row[name]) for name, text in formats.items() if row.get(name) not in (None, ""))
