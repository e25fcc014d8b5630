"""Reports as numbers in a file."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from normfree.files.csv_tables import csv_text
from normfree.signal.record import SignalRecords
from normfree.signal.verdicts import find_verdicts


def to_json(reports: Sequence[SignalRecords]) -> str:
    """Write one report as an object, several as a list of them; what is not finite is null."""
    documents = [
        dataclasses.asdict(report) | {"records": report.to_dicts(), "verdicts": find_verdicts(report)}
        for report in reports
    ]
    document = documents[0] if len(documents) == 1 else documents
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def to_csv(reports: Sequence[SignalRecords]) -> str:
    """Write a row per record, the model's name first."""
    rows = [{"model": report.model} | row for report in reports for row in report.to_dicts()]
    for row in rows:
        del row["samples"]
        row["shape"] = "x".join(map(str, row["shape"]))
    return csv_text(list(rows[0]), rows)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
