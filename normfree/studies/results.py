"""What a study found: a table, a chart, and the numbers as a file."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from normfree.studies.charts import draw_signal, draw_study
from normfree.studies.study import Entry, Study


def text(entry: Entry) -> str:
    """Mean ± standard deviation in percent, or what is to be said instead."""
    if not entry.trainings:
        return "missing"
    accuracies, failed = entry.accuracies, len(entry.trainings) - len(entry.accuracies)
    if not accuracies:
        return "fails"
    deviation = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{statistics.fmean(accuracies):.2f}{deviation}" + (f" ({failed} failed)" if failed else "")


def table(study: Study, entries: Sequence[Entry], out: Path) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row of texts for each row of the study."""
    columns = list(dict.fromkeys(entry.cell.column for entry in entries))
    texts = {(entry.cell.row, entry.cell.column): text(entry) for entry in entries}
    beside = study.beside(entries, out)
    rows = [
        [row, *(texts.get((row, column), "") for column in columns), *(more.get(row, "") for more in beside.values())]
        for row in dict.fromkeys(entry.cell.row for entry in entries)
    ]
    return [study.across, *columns, *beside], rows


def write(study: Study, out: Path, entries: Sequence[Entry]) -> list[Path]:
    """results.csv, table.md, chart.png and, where the signal was measured, signal.png."""
    written = [out / "results.csv", out / "table.md"]
    with written[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row", "column", "lr", "mean", "accuracies", "failed", "seconds"))
        writer.writerows(map(_row, entries))
    titles, rows = table(study, entries, out)
    lines = ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]
    written[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    if any(entry.accuracies for entry in entries):
        written.append(draw_study(study, entries, out / "chart.png"))
    if (out / "signal.csv").exists():
        written.append(draw_signal(entries, out / "signal.csv", out / "signal.png"))
    return written


def _row(entry: Entry) -> tuple[object, ...]:
    accuracies = entry.accuracies
    return (
        entry.cell.row,
        entry.cell.column,
        "" if entry.lr is None else entry.lr,
        f"{statistics.fmean(accuracies):.3f}" if accuracies else "",
        " ".join(f"{value:.3f}" for value in accuracies),
        len(entry.trainings) - len(accuracies),
        f"{sum(training.seconds for training in entry.trainings):.0f}",
    )
