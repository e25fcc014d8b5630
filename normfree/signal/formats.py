"""Reports as numbers in a file."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from normfree.files.csv_tables import csv_text
from normfree.signal.record import SignalRecord, SignalRecords
from normfree.signal.verdicts import find_verdicts

_WORST = 5


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


def to_markdown(reports: Sequence[SignalRecords]) -> str:
    """Write a page that is read in a minute: for each report the verdicts, what to try, and the five worst records."""
    return "\n".join(_summary(report) for report in reports)


def _summary(report: SignalRecords) -> str:
    lines = [
        f"# {report.model}",
        "",
        f"Signal at {len(report)} {report.kind}s, inputs {report.inputs}.",
        "",
        "## Verdicts",
    ]
    verdicts = find_verdicts(report)
    lines += ["", *(f"- {verdict}" for verdict in verdicts)]
    remedies = dict.fromkeys(f"- {v.remedy} (docs/{v.page})" for v in verdicts if v.is_problem)
    if remedies:
        lines += ["", "## What to try", "", *remedies]
    lines += ["", f"## The worst {min(len(report), _WORST)} {report.kind}s", ""]
    lines += ["| place | stage | variance | squared mean / variance | expected variance |", "|---|---|---|---|---|"]
    for record in sorted(report, key=_badness, reverse=True)[:_WORST]:
        expected = _expected(record)
        cells = (record.variance, record.mean_to_variance, "–" if expected is None else expected)
        shown = " | ".join(cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells)
        lines.append(f"| `{record.name}` | {record.stage} | {shown} |")
    return "\n".join(lines) + "\n"


def _expected(record: SignalRecord) -> float | None:
    return record.expected_variance if record.predicted_variance is None else record.predicted_variance


def _badness(record: SignalRecord) -> float:
    """Say how far a record is from what it should be, in powers of e: its variance, and its mean beyond that."""
    if not math.isfinite(record.variance + record.squared_mean):
        return math.inf
    expected = _expected(record) or 1.0
    departure = abs(math.log(max(record.variance, 1e-30) / expected))
    return departure + max(0.0, math.log(max(min(record.mean_to_variance, 1e30), 1e-30)))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
