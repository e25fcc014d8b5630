"""Output of the commands: tables or JSON, files, and the progress bar."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from normfree.extras import require_extra

Json = Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff]
"""Type of the flag that asks for JSON instead of a table."""


def first_process() -> bool:
    """Tell whether this process is the first of those that torchrun or accelerate launch has started."""
    return os.environ.get("RANK", "0") == "0"


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a rich table on a terminal, numbers on the right; lines of cells separated by tabs elsewhere."""
    console = Console()
    if not console.is_terminal:
        for row in itertools.chain([columns], rows):
            print(*row, sep="\t", flush=True)
        return
    table = Table(header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_json(value: Any) -> None:
    """Print a value as JSON; paths as text."""
    print(json.dumps(value, indent=2, default=str), flush=True)


def announce(paths: Iterable[Path]) -> None:
    """Print which files were written."""
    for path in paths:
        print(f"written: {path}")


def progress() -> Progress:
    """Make a bar on standard error, gone when done; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def working(description: str) -> Iterator[None]:
    """Show on a terminal that something goes on whose length nobody knows, and for how long already."""
    with progress() as bar:
        bar.add_task(description, total=None)
        yield


def check_writable(path: Path, suffixes: Iterable[str]) -> None:
    """Raise before a long measurement rather than after it.

    ValueError for the suffix, OSError for the place, ImportError where a package is missing.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: the suffix must be one of {', '.join(suffixes)}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"cannot write {path}: permission denied or a folder")
    if path.suffix.lower() in (".html", ".png", ".svg"):
        require_extra("charts", f"writing {path}")
