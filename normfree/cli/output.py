"""What the commands share: where output goes, and the progress bar."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def show(console: Console, item: Any) -> None:
    """A rich table on a terminal, plain lines in a pipe or a file."""
    if console.is_terminal:
        console.print(item)
    else:
        print(item)


def progress() -> Progress:
    """A bar on standard error, gone when done; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def check_writable(path: Path, suffixes: Iterable[str]) -> None:
    """Raise before a long measurement rather than after it: ValueError for the suffix, OSError for the place."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: the suffix must be one of {', '.join(suffixes)}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"cannot write {path}: permission denied or a folder")
