"""JSON documents: with a number of their format, a checksum of their content, and values of the declared types."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from normfree.arguments import hint_words, is_of
from normfree.files.whole import read_whole

T = TypeVar("T")
LARGEST = 2**24
"""Bytes that a document has at most."""


def document_text(values: Mapping[str, Any], *, format: int | None = None, indent: int | None = 2) -> str:
    """Write values as the text of a document, with the number of its format, if it has one, and a checksum."""
    content = dict(values) if format is None else {"format": format, **values}
    return json.dumps({**content, "checksum": _checksum(content)}, indent=indent) + "\n"


def read_document(path: Path, what: str, *, format: int | None = None) -> dict[str, Any]:
    """Read the values of a document.

    Raises ValueError, with the path, for another file than `what`, one whose content is not what was written, and for
    another format; FileNotFoundError where there is none, OSError where it cannot be read.
    """
    return parse_document(read_whole(path, largest=LARGEST), what, str(path), format=format)


def parse_document(text: str | bytes, what: str, name: str = "it", *, format: int | None = None) -> dict[str, Any]:
    """Read the values of a document's text. Raises ValueError as `read_document` does, with `name` for the path."""
    try:
        values = json.loads(text if isinstance(text, str) else text.decode())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{name} is no {what}, or a damaged one: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is no {what}: it holds a {type(values).__name__}")
    checksum = values.pop("checksum", None)
    if format is not None:
        check_format(values, format, name)
    if checksum is not None and checksum != _checksum(values):
        raise ValueError(
            f"{name} is not what was written (its checksum is another): take a whole copy of this {what} or, if it was "
            "changed on purpose, remove its line `checksum`"
        )
    if format is not None:
        values.pop("format", None)
    return values


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


def _checksum(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def from_values(cls: type[T], values: Mapping[str, Any], needed: Collection[str] = ()) -> T:
    """Make a dataclass of the values of a document, which must hold those `needed` even if they have a default.

    Raises ValueError that names what is unknown, missing or of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [name for name in values if name not in fields]
    without = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in fields if name not in values and (name in without or name in needed)]
    for names, words in ((unknown, "does not know"), (missing, "lacks")):
        if names:
            raise ValueError(f"{cls.__name__} {words} {', '.join(names)}")
    made = cls(**values)
    check_types(made)
    return made


def check_types(instance: Any) -> None:
    """Make lists in the fields of a dataclass tuples. Raises ValueError for a value of another type than declared."""
    for name, hint in _hints(instance.__class__).items():
        value = getattr(instance, name)
        if not is_of(value, hint):
            raise ValueError(f"{name} is {value!r}; it must be {hint_words(hint)}")
        if isinstance(value, list):  # JSON has no tuples
            object.__setattr__(instance, name, tuple(value))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)
