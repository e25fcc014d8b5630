"""A report as a table of text."""

from collections.abc import Callable
from typing import Any

from normfree.signal.record import STATISTICS, SignalRecord, SignalRecords
from normfree.signal.verdicts import find_verdicts

_NONE = "–"


def rich_table(report: SignalRecords) -> Any:
    """Make a table for `rich.print`; needs rich."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    columns, rows = cells(report)
    table = Table(title=escape(title(report)), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index > 2 else "left", overflow="fold")
    previous = None
    for row, record in zip(rows, report, strict=True):
        if previous is not None and record.stage != previous:
            table.add_section()
        previous = record.stage
        table.add_row(*map(escape, row))
    return Group(table, *(Text(f"· {line}") for line in footer(report)))


def rich_text(report: SignalRecords) -> str:
    """The rich table as text, as wide as the terminal; needs rich."""
    from rich.console import Console

    console = Console()
    with console.capture() as capture:
        console.print(rich_table(report))
    return capture.get().rstrip("\n")


def plain_text(report: SignalRecords) -> str:
    """Write the table for pipes, files and `print`."""
    columns, rows = cells(report)
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = [title(report)]
    for row in (columns, *rows):
        padded = [c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, *(f"· {line}" for line in footer(report))])


def title(report: SignalRecords) -> str:
    """Say in a line what was measured."""
    seeds = f", {report.seeds} seeds" if report.seeds > 1 else ""
    return f"{report.model}: signal at {len(report)} {report.kind}s, inputs {report.inputs}{seeds}"


def footer(report: SignalRecords) -> list[str]:
    """List the verdicts, what to do about them, and what was done to the model to measure it."""
    lines: list[str] = []
    for verdict in find_verdicts(report):
        lines.append(verdict)
        remedy = f"to mend it: {verdict.remedy} (docs/{verdict.page})"
        if verdict.is_problem and remedy not in lines:
            lines.append(remedy)
    if report.predicted:
        lines.append(f"predicted from weights and structure, as if {'; '.join(report.assumptions)}")
    if report.opened:
        shown = ", ".join(report.opened[:3]) + (", …" if len(report.opened) > 3 else "")
        lines.append(f"opened for the measurement (set to one): {len(report.opened)} parameters, {shown}")
    return lines


def cells(report: SignalRecords) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row of text per record; columns without a value are left out."""
    columns: dict[str, Callable[[SignalRecord], str]] = {
        "module": lambda r: r.name,
        "stage": lambda r: str(r.stage),
        "shortcut": lambda r: r.shortcut,
        "shape": lambda r: "×".join(map(str, r.shape)),
    }
    for statistic in STATISTICS:
        columns[statistic.replace("_", " ")] = lambda r, name=statistic: _number(getattr(r, name))  # type: ignore[misc]
        if statistic == "variance":
            columns["expected"] = lambda r: _number(r.expected_variance)
            columns["predicted"] = lambda r: _number(r.predicted_variance)
    shown = {name: cell for name, cell in columns.items() if any(cell(record) != _NONE for record in report)}
    return list(shown), [[cell(record) for cell in shown.values()] for record in report]


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4g}"
