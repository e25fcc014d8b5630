"""Charts of a study."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normfree.plotting import COLORS, altair, write_chart
from normfree.studies.columns import read_signal, recipe_macs
from normfree.studies.peaks import read_peaks
from normfree.studies.study import Entry, Study

_TITLES = {
    "macs": "million multiply-accumulates of an image",
    "seconds": "seconds to train",
    "memory": "MiB that a step adds",
}


def draw_study(study: Study, entries: Sequence[Entry], path: Path) -> Path:
    """Draw a panel per axis of the study: a dot per training, a line per row through the means of its cells.

    Where there is one column, the rows are beside each other instead.
    """
    peaks = read_peaks(path.parent)
    points = [point for entry in entries for point in _points(study, entry, peaks)]
    columns = list(dict.fromkeys(entry.cell.column for entry in entries))
    panels = [_panel(study, points, columns, axis) for axis in study.chart_axes]
    chart = altair().hconcat(*panels, spacing=24).configure_legend(orient="top", labelLimit=0, columns=3)
    return write_chart(chart.configure_view(stroke="#cccccc").to_dict(), path)


def _points(study: Study, entry: Entry, peaks: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    seconds = {training.seed: training.seconds for training in entry.trainings}
    costs = {"macs": recipe_macs(entry.cell.recipe) / 1e6} if "macs" in study.chart_axes else {}
    if (peak := peaks.get((entry.cell.row, entry.cell.column))) is not None:
        costs["memory"] = peak
    return [
        {"row": entry.cell.row, "column": entry.cell.column, "accuracy": t.top1, "seconds": seconds[t.seed]} | costs
        for t in entry.tests
    ]


def _panel(study: Study, points: list[dict[str, Any]], columns: list[str], axis: str) -> Any:
    alt = altair()
    apart = _apart(list(dict.fromkeys(point["row"] for point in points)))
    width = max(420, 6 * len(columns) * max(map(len, columns)))  # names of columns beside each other
    chart = alt.Chart(alt.Data(values=points), width=width, height=280)
    accuracy = {"title": "Accuracy, %", "scale": alt.Scale(zero=False)}
    if len(columns) == 1:
        rows = alt.Y("row:N", title=None, sort=None, axis=alt.Axis(labelLimit=0))
        mean = chart.mark_tick(thickness=3).encode(x=alt.X("mean(accuracy):Q", **accuracy), y=rows)
        return mean + chart.mark_point().encode(x=alt.X("accuracy:Q", **accuracy), y=rows)
    if axis == "column":
        x: Any = alt.X("column:N", title=study.column_title, sort=columns, axis=alt.Axis(labelAngle=0))
        line = chart.mark_line().encode(x=x, y=alt.Y("mean(accuracy):Q", **accuracy), **apart["line"])
    else:
        x = alt.X(f"{axis}:Q", title=_TITLES[axis]).scale(zero=False)
        means = chart.transform_aggregate(x=f"mean({axis})", y="mean(accuracy)", groupby=["row", "column"])
        line = means.mark_line().encode(x=alt.X("x:Q"), y=alt.Y("y:Q"), **apart["line"])
    return line + chart.mark_point(filled=True).encode(x=x, y=alt.Y("accuracy:Q", **accuracy), **apart["point"])


def _apart(rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what tells rows apart, by mark: a colour, and where the colours begin again, a dash and a shape."""
    alt = altair()
    dashes, shapes = [[1, 0], [6, 3], [2, 2]], ["circle", "square", "triangle-up"]
    rounds = [i // len(COLORS) % len(dashes) for i in range(len(rows))]

    def channel(kind: Any, values: Sequence[Any]) -> Any:
        return kind("row:N", title=None, sort=None).scale(domain=list(rows), range=list(values))

    color = channel(alt.Color, [COLORS[i % len(COLORS)] for i in range(len(rows))])
    return {
        "line": {"color": color, "strokeDash": channel(alt.StrokeDash, [dashes[i] for i in rounds])},
        "point": {"color": color, "shape": channel(alt.Shape, [shapes[i] for i in rounds])},
    }


def draw_signal_moments(entries: Sequence[Entry], source: Path, path: Path) -> Path:
    """Draw the average channel variance over the blocks, a panel per row: start, middle and end of a training."""
    alt = altair()
    moments = ("start", "middle", "end")
    points = [
        {"row": entry.cell.row, "moment": moment, "block": row["depth"], "variance": row["variance"]}
        for entry in entries
        for moment, rows in zip(moments, read_signal(source, entry), strict=False)
        for row in rows
        if 0 < row["variance"] < math.inf
    ]
    line = alt.Chart(alt.Data(values=points), width=200, height=150).mark_line(point=True)
    chart = line.encode(
        x=alt.X("block:Q"),
        y=alt.Y("variance:Q", title="channel variance").scale(type="log"),
        color=alt.Color("moment:N", title=None, sort=moments).scale(domain=moments, range=COLORS),
    )
    faceted = chart.facet(alt.Facet("row:N", title=None, sort=None, header=alt.Header(labelLimit=0)), columns=3)
    return write_chart(faceted.configure_legend(orient="top").to_dict(), path)
