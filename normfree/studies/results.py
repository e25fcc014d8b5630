"""Results of a study: a table, a chart, and the numbers as a file."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from normfree.files.csv_tables import csv_text
from normfree.files.whole import write_whole
from normfree.studies.charts import draw_signal_moments, draw_study
from normfree.studies.study import Entry, Study

_COLUMNS = ("row", "column", "lr", "mean", "accuracies", "balanced", "validation", "failed", "seconds")


def format_entry(entry: Entry, *, balanced: bool = False) -> str:
    """Format mean ± standard deviation in percent, of the balanced accuracy too if asked for, or a word for none."""
    if not entry.trainings:
        return "missing"
    if entry.failed == len(entry.trainings):
        return "fails"
    if len(entry.tests) < len(entry.trainings) - entry.failed:
        return "unfinished"
    texts = [_mean_and_deviation(values) for values in (entry.accuracies, *([entry.balanced] if balanced else []))]
    return " / ".join(texts) + (f" ({entry.failed} failed)" if entry.failed else "")


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def build_table(study: Study, entries: Sequence[Entry], out: Path) -> tuple[list[str], list[list[str]]]:
    """Build the column titles, and a row of texts for each row of the study."""
    columns = list(dict.fromkeys(entry.cell.column for entry in entries))
    texts = {(entry.cell.row, entry.cell.column): format_entry(entry, balanced=study.balanced) for entry in entries}
    extra = study.extra_columns(entries, out)
    rows = [
        [row, *(texts.get((row, column), "") for column in columns), *(more.get(row, "") for more in extra.values())]
        for row in dict.fromkeys(entry.cell.row for entry in entries)
    ]
    return [study.column_title, *columns, *extra], rows


def write_results(study: Study, out: Path, entries: Sequence[Entry]) -> list[Path]:
    """Write results.csv, table.md, chart.png and, where the signal was measured, signal.png."""
    written = [out / "results.csv", out / "table.md"]
    write_whole(written[0], csv_text(_COLUMNS, [dict(zip(_COLUMNS, _row(e), strict=True)) for e in entries]))
    titles, rows = build_table(study, entries, out)
    lines = ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]
    write_whole(written[1], "\n".join(lines) + "\n")
    if any(entry.accuracies for entry in entries):
        written.append(draw_study(study, entries, out / "chart.png"))
    if (out / "signal.csv").exists():
        written.append(draw_signal_moments(entries, out / "signal.csv", out / "signal.png"))
    return written


def _row(entry: Entry) -> tuple[object, ...]:
    accuracies = entry.accuracies
    return (
        entry.cell.row,
        entry.cell.column,
        "" if entry.lr is None else entry.lr,
        f"{statistics.fmean(accuracies):.3f}" if accuracies else "",
        " ".join(f"{value:.3f}" for value in accuracies),
        " ".join(f"{value:.3f}" for value in entry.balanced),
        " ".join("" if t.validation is None else f"{t.validation:.3f}" for t in entry.trainings),
        entry.failed,
        f"{sum(training.seconds for training in entry.trainings):.0f}",
    )
