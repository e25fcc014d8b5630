"""What trainings look like: learning curves, and the signal over time."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfree.plotting import COLORS, altair, write


def draw(runs: Sequence[Path], path: Path) -> Path:
    """Loss and accuracy over the steps of each run folder, as .png, .svg or .html.

    Raises ValueError for another suffix, ImportError without the extra "charts", OSError for a folder without metrics.
    """
    return write(_chart(altair(), [point for run in runs for point in points(run)], len(runs) > 1).to_dict(), path)


_KINDS = {"train": "training", "eval": "test", "eval_ema": "test, averaged"}


def points(run: Path) -> list[dict[str, Any]]:
    """Loss and accuracy of a run's folder, one dictionary each: run, of (training or test), step, what, value."""
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [
        {"run": run.name, "of": _KINDS[row["kind"]], "step": int(row["step"]), "what": what, "value": float(row[what])}
        for row in rows
        for what in ("loss", "top1")
        if row[what]
    ]


def _chart(alt: Any, values: list[dict[str, Any]], several: bool) -> Any:
    color = alt.Color("run:N" if several else "of:N", title=None).scale(range=COLORS)
    panels = []
    for what, title in (("loss", "Loss"), ("top1", "Accuracy, %")):
        data = alt.Data(values=[p for p in values if p["what"] == what])
        line = alt.Chart(data, width=360, height=240).encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title=title).scale(zero=False),
            color=color,
            strokeDash=alt.StrokeDash("of:N", title=None) if several else alt.Undefined,
        )
        panels.append(line.mark_line() + line.transform_filter(alt.datum.of != "training").mark_point(filled=True))
    return alt.hconcat(*panels, spacing=24).configure_legend(orient="top").configure_view(stroke="#cccccc")


def draw_signal(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """The signal over depth and step, as `SignalMonitor` has it: a panel per statistic, logarithmic colours."""
    alt = altair()
    panels = []
    for statistic, title in _PANELS.items():
        points = [
            {"step": row["step"], "depth": row["depth"], "value": math.log10(row[statistic]), "name": row["name"]}
            for row in rows
            if 0 < row.get(statistic, 0) < math.inf
        ]
        if points:
            panels.append(
                alt.Chart(alt.Data(values=points), width=360, height=240, title=title)
                .mark_rect()
                .encode(
                    x=alt.X("step:O", title="step", axis=alt.Axis(labelOverlap=True)),
                    y=alt.Y("depth:O", title="block", axis=alt.Axis(labelOverlap=True)),
                    color=alt.Color("value:Q", title="log₁₀").scale(scheme="viridis"),
                    tooltip=["name:N", "step:O", "value:Q"],
                )
            )
    if not panels:
        raise ValueError("the monitor has measured nothing yet")
    pairs = [alt.hconcat(*panels[i : i + 2]).resolve_scale(color="independent") for i in range(0, len(panels), 2)]
    return write(alt.vconcat(*pairs).resolve_scale(color="independent").to_dict(), path)


_PANELS = {
    "variance": "Average channel variance",
    "squared_mean": "Average channel squared mean",
    "gradient_variance": "Gradient: variance",
    "residual_variance": "Residual average channel variance",
}
