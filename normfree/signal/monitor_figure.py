"""The signal of a training, depth over steps, as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfree.plotting import altair, write_chart
from normfree.signal.monitor_rows import TRAINING_STATISTICS
from normfree.signal.record import STATISTICS

_TITLES = STATISTICS | TRAINING_STATISTICS
# Statistics that are drawn, and what stands at their depths.
_SHOWN = {
    "variance": "block", "squared_mean": "block", "gradient_variance": "block", "residual_variance": "block",
    "branch_to_stream": "block", "zeros": "rectifier", "dead": "rectifier", "update_ratio": "parameter",
    "gradient_rms": "parameter",
}  # fmt: skip
_FRACTIONS = {"zeros", "dead"}


def draw_signal(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the rows of a `SignalMonitor` over depth and step: a panel per statistic, logarithmic but of fractions."""
    alt = altair()
    panels = [panel for statistic in _SHOWN if (panel := _panel(alt, rows, statistic)) is not None]
    if not panels:
        raise ValueError("the monitor has measured nothing yet")
    pairs = [alt.hconcat(*panels[i : i + 2]).resolve_scale(color="independent") for i in range(0, len(panels), 2)]
    return write_chart(alt.vconcat(*pairs).resolve_scale(color="independent").to_dict(), path)


def _panel(alt: Any, rows: Sequence[dict[str, Any]], statistic: str) -> Any:
    fraction = statistic in _FRACTIONS
    points = [
        {
            "step": row["step"],
            "depth": row["depth"],
            "value": row[statistic] if fraction else math.log10(row[statistic]),
            "name": row["name"],
        }
        for row in rows
        if statistic in row and (fraction or 0 < row[statistic] < math.inf)
    ]
    if not points:
        return None
    scale = alt.Scale(scheme="viridis", domain=[0, 1]) if fraction else alt.Scale(scheme="viridis")
    return (
        alt.Chart(alt.Data(values=points), width=360, height=240, title=_TITLES[statistic])
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="step", axis=alt.Axis(labelOverlap=True)),
            y=alt.Y("depth:O", title=_SHOWN[statistic], axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("value:Q", title="fraction" if fraction else "log₁₀", scale=scale),
            tooltip=["name:N", "step:O", "value:Q"],
        )
    )
