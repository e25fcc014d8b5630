"""Rows of a monitor: made of what was measured, read from signal.csv, given as a data frame."""

import contextlib
import importlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from normfree.signal.reader import Reader
from normfree.signal.record import STATISTICS

TRAINING_STATISTICS = {
    "branch_to_stream": "Branch over stream",
    "zeros": "Zeros behind rectifiers",
    "dead": "Dead channels",
    "update_ratio": "Update over parameter",
    "gradient_rms": "Parameter's gradient",
}
"""What a `SignalMonitor` measures besides the fields of `SignalRecord`, and its titles in figures."""

COLUMNS = ("step", "kind", "depth", "name", "stage", "shape", *STATISTICS, *TRAINING_STATISTICS)
"""Columns of signal.csv, a row per measured step and place.

kind is join (or weight layer, in networks without joins), rectifier or parameter; depth counts from 0 in each.
"""


def signal_rows(reader: Reader, statistics: Collection[str], loss_scale: float) -> list[dict[str, Any]]:
    """Return a row per join (or weight layer) and per rectifier, with those of the statistics that are known there."""
    kind = "join" if reader.joins else "weight layer"
    ratios = reader.branches_to_stream()
    rows: list[dict[str, Any]] = []
    for depth, record in enumerate(reader.records()):
        numbers = {name: getattr(record, name) for name in STATISTICS}
        numbers |= {"branch_to_stream": ratios[depth]} if ratios else {}
        numbers = {name: value for name, value in numbers.items() if name in statistics and value is not None}
        for name in numbers:
            if name.startswith("gradient"):
                numbers[name] /= loss_scale**2
        if numbers:
            place = _place(kind, depth, record.name, record.shape)
            rows.append(place | {"stage": record.stage} | numbers)
    for depth, (name, node) in enumerate(reader.rectifiers()):
        assert node.zeros is not None
        found = dict(zip(("zeros", "dead"), node.zeros.tolist(), strict=True))
        numbers = {statistic: value for statistic, value in found.items() if statistic in statistics}
        rows.append(_place("rectifier", depth, name, node.shape) | numbers)
    return rows


def _place(kind: str, depth: int, name: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"kind": kind, "depth": depth, "name": name, "shape": "x".join(map(str, shape))}


def parsed_row(row: Mapping[str, str]) -> dict[str, Any]:
    """Read a row of signal.csv. Raises KeyError, TypeError or ValueError for one of something else."""
    numbers = {name: float(row[name]) for name in (*STATISTICS, *TRAINING_STATISTICS) if row[name]}
    stage = {"stage": int(row["stage"])} if row["stage"] else {}
    place = {"kind": row["kind"], "depth": int(row["depth"]), "name": row["name"], "shape": row["shape"]}
    return {"step": int(row["step"])} | place | stage | numbers


def to_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows as a data frame; see `SignalMonitor.to_frame`."""
    columns = {name: [row.get(name) for row in rows] for name in COLUMNS}
    for package in sorted(("pandas", "polars"), key=lambda name: name not in sys.modules):
        with contextlib.suppress(ImportError):
            return importlib.import_module(package).DataFrame(columns)
    raise ImportError("to_frame needs pandas or polars: install one of them, or take monitor.rows")
