"""Tables as .csv files: written, read, and grown by rows that outlive an interruption."""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from normfree.errors import TrainingError, WritingError
from normfree.files.whole import read_whole, reason, replacing

_LARGEST = 2**30  # bytes


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> str:
    """Return rows as the text of a .csv file, one line each, the column names first if `header`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_csv(path: Path) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """Return columns and rows of a .csv file, but for lines that were interrupted; none where there is no file.

    Raises ValueError, with the path, for what is no table, OSError where it cannot be read.
    """
    text = _read(path)
    try:
        reader = csv.DictReader(io.StringIO(text[: _complete(text)], newline=""), strict=True)
        rows = list(reader)
        if any(None in row for row in rows):
            raise csv.Error("a row has more fields than there are columns")
        return tuple(reader.fieldnames or ()), [row for row in rows if None not in row.values()]
    except csv.Error as error:
        raise ValueError(f"{path} is no table, or a damaged one: {error}") from error


@contextlib.contextmanager
def reading_rows(path: Path) -> Iterator[None]:
    """Name the table where a row of it does not hold what it should: ValueError."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        words = f"it has no column {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no table of this kind, or a damaged one: {words}") from error


def _read(path: Path) -> str:
    """Return the text of a table; none where there is no file. Raises ValueError, with the path, for no text."""
    if not path.exists():
        return ""
    try:
        return read_whole(path, largest=_LARGEST).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no table, or a damaged one: {error}") from error


def append_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a .csv file, on the disk when this returns; a last line that was interrupted is cut off before.

    Raises ValueError for a file of other columns, WritingError where it cannot be written.
    """
    if path.is_dir():
        raise WritingError(f"cannot write {path}: it is a folder")
    if not _has_columns(path, columns):
        raise ValueError(f"{path} has other columns than {', '.join(columns)}: choose another place")
    held = path.read_bytes() if path.exists() else b""
    if _complete(held) < len(held):
        os.truncate(path, _complete(held))
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(csv_text(columns, rows, header=not _complete(held)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WritingError(f"cannot write {path}: {reason(error, path)}") from error


def _has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Tell whether a file has these columns, or the beginning of them that an interruption left, or is not there."""
    first, end, _ = _read(path).partition("\n")
    header = csv_text(columns, []).removesuffix("\n")
    return first == header if end else header.startswith(first)


def _complete(text: str | bytes) -> int:
    """Length of the complete lines."""
    return 1 + (text.rfind("\n") if isinstance(text, str) else text.rfind(b"\n"))


class Table:
    """A .csv file that grows by rows, each of a step, and can be cut back to one."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)

    def cut_back(self, step: int, keep: Callable[[Mapping[str, str]], bool] = lambda row: True) -> list[dict[str, str]]:
        """Remove the rows after `step`, and of those at `step` the ones that `keep` does not want; return the others.

        Raises TrainingError for a file of other columns, and where it cannot be written; ValueError for a damaged one.
        """
        if not _has_columns(self.path, self.columns):
            raise TrainingError(f"{self.path} is no file of a training, or of another one: choose another place")
        _, rows = read_csv(self.path)
        with reading_rows(self.path):
            kept = [row for row in rows if int(row["step"]) < step or (int(row["step"]) == step and keep(row))]
        with replacing(self.path) as path:
            path.write_text(csv_text(self.columns, kept), encoding="utf-8")
        return kept

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows, so that they outlive this process. Raises WritingError where they cannot be written."""
        append_csv(self.path, self.columns, rows)
