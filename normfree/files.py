"""Files that are complete and on the disk, or not there; tables that grow; formats with a version."""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from normfree.errors import TrainingError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` at the end; after a failure that is as it was.

    Raises TrainingError where it cannot be written.
    """
    temporary = path.with_name(f"new.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except Exception as error:  # safetensors has an error of its own for a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {path}: {error}") from error


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_format(values: Mapping[str, Any], current: int, what: str) -> None:
    """Raise ValueError where `values` were written in another format than the `current` one.

    The first format wrote no number: what has none is of format 1.
    """
    found = values.get("format", 1)
    if found == current:
        return
    if isinstance(found, int) and found > current:
        raise ValueError(f"{what} has format {found}, and this normfree reads {current}: install a newer normfree")
    raise ValueError(f"{what} has format {found!r}, which this normfree does not read any more: it reads {current}")


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> str:
    """Return rows as the text of a .csv file, one line each, the column names first if `header`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_csv(path: Path) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """Return columns and rows of a .csv file, but for lines that were interrupted; none where there is no file."""
    if not path.exists():
        return (), []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: _complete(text)], newline=""))
    return tuple(reader.fieldnames or ()), [row for row in reader if None not in row.values()]


def append_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a .csv file, on the disk when this returns; a last line that was interrupted is cut off before.

    Raises ValueError for a file of other columns, OSError where it cannot be written.
    """
    if not _has_columns(path, columns):
        raise ValueError(f"{path} has other columns than {', '.join(columns)}: choose another place")
    held = path.read_bytes() if path.exists() else b""
    if _complete(held) < len(held):
        os.truncate(path, _complete(held))
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(csv_text(columns, rows, header=not _complete(held)))
        file.flush()
        os.fsync(file.fileno())


def _has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Tell whether a file has these columns, or the beginning of them that an interruption left, or is not there."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    first, end, _ = text.partition("\n")
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

        Raises TrainingError for a file of other columns, and where it cannot be written.
        """
        if not _has_columns(self.path, self.columns):
            raise TrainingError(f"{self.path} is no file of a training, or of another one: choose another place")
        _, rows = read_csv(self.path)
        kept = [row for row in rows if int(row["step"]) < step or (int(row["step"]) == step and keep(row))]
        with replacing(self.path) as path:
            path.write_text(csv_text(self.columns, kept), encoding="utf-8")
        return kept

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows, so that they outlive this process. Raises TrainingError where they cannot be written."""
        try:
            append_csv(self.path, self.columns, rows)
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error}") from error
