"""The screen of a training: a bar on a terminal, lines elsewhere."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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

    def show_step(self, done: int) -> None:
        """Show how many optimizer steps are done."""
        self.progress.update(self.task, completed=done)

    def show_row(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics.csv."""
        words = _summary(row)
        if row["kind"] == "train":
            self.progress.update(self.task, description=f"epoch {row['epoch'] + 1}", words=words)
            if not self.live:
                self.print(f"step {row['step']}: {words}")
        else:
            self.print(f"epoch {row['epoch'] + 1}, {'test' if row['kind'] == 'eval' else 'test, averaged'}: {words}")

    def print(self, text: str) -> None:
        """Print a line that stays."""
        if self.live:
            self.progress.console.print(text, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _summary(row: Mapping[str, Any]) -> str:
    formats = {
        "loss": "loss {:.4f}", "top1": "top-1 {:.2f} %", "top5": "top-5 {:.2f} %", "lr": "lr {:.3g}",
        "images_per_second": "{:.0f} images/s",
    }  # fmt: skip
    return ", ".join(text.format(row[name]) for name, text in formats.items() if row.get(name) not in (None, ""))
