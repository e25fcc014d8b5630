"""Reports as numbers in a file."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from normfree.signal.report import SignalReport


def to_json(reports: Sequence[SignalReport]) -> str:
    """One report as an object, several as a list of them; what is not finite is null."""
    documents = [
        dataclasses.asdict(report) | {"records": report.to_dicts(), "verdicts": report.verdicts} for report in reports
    ]
    document = documents[0] if len(documents) == 1 else documents
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def to_csv(reports: Sequence[SignalReport]) -> str:
    """A row per record, the model's name first."""
    rows = [{"model": report.model} | row for report in reports for row in report.to_dicts()]
    for row in rows:
        del row["samples"]
        row["shape"] = "x".join(map(str, row["shape"]))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
