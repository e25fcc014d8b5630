"""Signal propagation plots, and the page around them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normfree.arguments import checked
from normfree.files.whole import write_whole
from normfree.plotting import COLORS, altair, render, write_chart
from normfree.signal.formats import to_csv, to_json, to_markdown
from normfree.signal.page import render_page, sections
from normfree.signal.record import STATISTICS, SignalRecords

# A row of panels each: of the signal, of its gradient.
_ROWS = tuple(
    {name: title for name, title in STATISTICS.items() if name.startswith("gradient") == of_gradient}
    for of_gradient in (False, True)
)
_ROUNDING = 1e-12
SUFFIXES = (".html", ".png", ".svg", ".md", ".csv", ".json")


@checked
def compare(
    reports: SignalRecords | Sequence[SignalRecords] | Mapping[str, SignalRecords | Sequence[SignalRecords]],
    title: str = "",
    *,
    below: Sequence[Any] = (),
) -> "SignalFigure":
    """Draw several models in one figure: the paper's three panels, logarithmic (Brock et al. 2021, figure 1).

    Models of the same name in several rows share a colour; within a row, later ones of the same name are numbered.

    Args:
        reports: A report, a sequence of them, or a mapping from the label of a row of panels to its reports.
        title: Title of the figure.
        below: Altair charts that stand under the panels.

    Returns:
        A figure to be saved, or looked at in a notebook. Saving raises ImportError without the extra "charts".

    Raises:
        ValueError: Where there is no report.
    """
    by_label = reports if isinstance(reports, Mapping) else {"": reports}
    rows = {label: [row] if isinstance(row, SignalRecords) else list(row) for label, row in by_label.items()}
    if not any(rows.values()):
        raise ValueError("there is no report to draw")
    return SignalFigure({label: row for label, row in rows.items() if row}, title, below)


class SignalFigure:
    """Signal propagation plots of some reports: `save` it, or look at it in a notebook."""

    def __init__(self, rows: dict[str, list[SignalRecords]], title: str, below: Sequence[Any] = ()) -> None:
        self.rows = rows
        self.title = title
        self.below = below

    def to_vega_lite(self, titled: bool = False) -> dict[str, Any]:
        """The chart as a Vega-Lite specification; titled, it stands alone as a picture that nobody clicks on."""
        alt = altair()
        rows = {label: _named(reports) for label, reports in self.rows.items()}
        names = list(dict.fromkeys(name for row in rows.values() for name, _ in row))
        shown = alt.selection_point(
            name="shown", fields=["model"], bind="legend", toggle="true", empty=False,
            value=[{"model": name} for name in names],
        )  # fmt: skip
        color = alt.Color("model:N", title="model" if titled else "model (click to hide or show)", sort=names).scale(
            domain=names, range=[COLORS[i % len(COLORS)] for i in range(len(names))]
        )
        numbers = {(label, name): index for index, (name, label, _) in enumerate(self._named_reports())}
        lines: list[Any] = []
        for label, row in rows.items():
            data = [point for name, report in row for point in _points(name, report, numbers[label, name])]
            for panels in _ROWS:
                charts = [_panel(alt, data, statistic, text, color) for statistic, text in panels.items()]
                charts = [chart for chart in charts if chart is not None]
                if not charts:
                    continue
                if not lines:
                    # The selection belongs to one view; the others refer to it by its name.
                    charts[0].layer[0] = charts[0].layer[0].add_params(shown)
                line = alt.hconcat(*charts, spacing=24)
                lines.append(line.properties(title=alt.Title(label, anchor="start", fontSize=13)) if label else line)
        chart = alt.vconcat(*lines, spacing=28)
        if self.below:
            chart = alt.vconcat(chart, *self.below, spacing=28).resolve_scale(color="independent")
        if titled and self.title:
            caption = self._caption()
            chart = chart.properties(
                title=alt.Title(self.title, subtitle=caption, anchor="start", fontSize=16, offset=12)
            )
        chart = (
            chart.configure_axis(labelFontSize=11, titleFontSize=12, gridOpacity=0.5)
            .configure_legend(
                labelFontSize=12,
                titleFontSize=12,
                labelLimit=0,
                titleLimit=0,
                symbolStrokeWidth=3,
                orient="top",
                columns=4,
            )
            .configure_view(stroke="#cccccc")
        )
        return dict(chart.to_dict())

    def _caption(self) -> str:
        """Explain the marks that are there."""
        reports = [report for row in self.rows.values() for report in row]
        words = []
        if any(report.seeds > 1 for report in reports):
            words.append("Lines: mean over the seeds; bands: from the lowest to the highest.")
        expected = any(record.expected_variance for report in reports for record in report)
        dashed = ["the variance that the network expects of itself"] if expected else []
        if any(report.predicted for report in reports):
            dashed.append("what follows from weights and structure")
        if dashed:
            words.append(f"Dashed: {', else '.join(dashed)}.")
        return " ".join(words)

    def save(self, path: str | Path) -> Path:
        """Write .html (one file that needs no network), .png or .svg, a summary (.md), or the numbers (.csv, .json).

        Raises ValueError for another suffix, OSError where it cannot be written; the file before is then as it was.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        reports = [report for row in self.rows.values() for report in row]
        if suffix == ".json":
            write_whole(path, to_json(reports))
        elif suffix == ".csv":
            write_whole(path, to_csv(reports))
        elif suffix == ".md":
            write_whole(path, to_markdown(reports))
        elif suffix == ".html":
            write_whole(path, self.to_html())
        elif suffix in (".svg", ".png"):
            write_chart(self.to_vega_lite(titled=True), path)
        else:
            raise ValueError(f"cannot write {path}: the suffix must be one of {', '.join(SUFFIXES)}")
        return path

    def to_html(self) -> str:
        """The page: interactive chart, verdicts, and a table per report."""
        title = self.title or "Signal propagation"
        return render_page(title, self._caption(), self.to_vega_lite(), self._named_reports())

    def _repr_html_(self) -> str:
        chart = render("vegalite_to_svg", vl_spec=self.to_vega_lite(titled=True))
        return f"{chart}{sections(self._named_reports())}"

    def _named_reports(self) -> list[tuple[str, str, SignalRecords]]:
        return [(name, label, report) for label, row in self.rows.items() for name, report in _named(row)]


def _named(reports: Sequence[SignalRecords]) -> list[tuple[str, SignalRecords]]:
    named: dict[str, SignalRecords] = {}
    for report in reports:
        name, number = report.model, 1
        while name in named:
            number += 1
            name = f"{report.model} ({number})"
        named[name] = report
    return list(named.items())


def _points(name: str, report: SignalRecords, number: int) -> list[dict[str, Any]]:
    """Make one row of data per record and statistic, of the report of this number on the page.

    Values that a logarithmic axis cannot show are left out: not finite, zero, and the rounding that stands for zero
    where a normalizer has just centered the channels.
    """
    points = []
    for position, record in enumerate(report, 1):
        for statistic in STATISTICS:
            value = getattr(record, statistic)
            if value is None or not math.isfinite(value) or value <= _ROUNDING * record.variance:
                continue
            samples = record.samples.get(statistic, (value,))
            points.append(
                {
                    "model": name,
                    "report": number,
                    "statistic": statistic,
                    "block": position,
                    "module": record.name,
                    "stage": record.stage,
                    "shape": "×".join(map(str, record.shape)),
                    "shortcut": record.shortcut,
                    "value": value,
                    "low": max(min(samples), value * 1e-6),
                    "high": max(samples),
                    "expected": _expected(record, statistic),
                }
            )
    return points


def _expected(record: Any, statistic: str) -> float | None:
    """Return what the network's ledger, or else the prediction, says of a statistic, if it can be drawn."""
    value = record.expected_variance if statistic == "variance" else None
    value = value or getattr(record, f"predicted_{statistic}", None)
    return value if value and math.isfinite(value) and value > _ROUNDING * record.variance else None


def _panel(alt: Any, data: list[dict[str, Any]], statistic: str, title: str, color: Any) -> Any:
    """One panel, or None where there is nothing that it could show."""
    data = [point for point in data if point["statistic"] == statistic]
    if not data:
        return None
    axis_title = "residual block" if data[0]["shortcut"] != "none" else "weight layer"
    x = alt.X("block:Q", title=axis_title, axis=alt.Axis(tickMinStep=1, format="d")).scale(nice=False, padding=8)
    log = alt.Scale(type="log", nice=True)
    label = "abs(log(datum.value)) < 7 ? format(datum.value, '~r') : format(datum.value, '.0e')"
    axis = alt.Axis(values=_ticks([p[key] for p in data for key in ("low", "high")]), labelExpr=label)
    y = alt.Y("value:Q", title=None, axis=axis).scale(log)
    tooltip = [
        "model:N", "module:N", "stage:Q", "shape:N", "shortcut:N",
        alt.Tooltip("value:Q", format=".4g", title=title.lower()),
        alt.Tooltip("low:Q", format=".4g", title="lowest seed"),
        alt.Tooltip("high:Q", format=".4g", title="highest seed"),
        alt.Tooltip("expected:Q", format=".4g", title="expected"),
    ]  # fmt: skip
    base = alt.Chart(alt.Data(values=data)).transform_filter({"param": "shown", "empty": False})
    band = base.mark_area(fillOpacity=0.2).encode(x, alt.Y("low:Q").scale(log), alt.Y2("high:Q"), color)
    expected = base.mark_line(strokeDash=[3, 3], strokeWidth=1, opacity=0.8).encode(
        x, alt.Y("expected:Q").scale(log), color
    )
    line = base.mark_line(strokeWidth=2).encode(x, y, color)
    dots = base.mark_circle(size=36, opacity=1).encode(x, y, color, tooltip=tooltip)
    layers = [band, line, dots] + ([expected] if any(p["expected"] for p in data) else [])
    return alt.layer(*layers).properties(
        width=300, height=260, title=alt.Title(title, fontSize=13, fontWeight="normal")
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten, and between them 2 and 5 where there are few; beyond the values, for when models are hidden."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    factors = (1, 2, 5) if high - low <= 2 else (1,)
    step = max(1, (high - low) // 8)
    return [factor * 10.0**exponent for exponent in range(low - 1, high + 2, step) for factor in factors]
