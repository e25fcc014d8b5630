"""The signal of a training, depth over steps, as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfree.plotting import altair, write_chart
from normfree.signal.record import STATISTICS

_SHOWN = ("variance", "squared_mean", "gradient_variance", "residual_variance")


def draw_signal(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the rows of a `SignalMonitor` over depth and step: a panel per statistic, logarithmic colours."""
    alt = altair()
    panels = []
    for statistic in _SHOWN:
        points = [
            {"step": row["step"], "depth": row["depth"], "value": math.log10(row[statistic]), "name": row["name"]}
            for row in rows
            if 0 < row.get(statistic, 0) < math.inf
        ]
        if points:
            panels.append(
                alt.Chart(alt.Data(values=points), width=360, height=240, title=STATISTICS[statistic])
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
    return write_chart(alt.vconcat(*pairs).resolve_scale(color="independent").to_dict(), path)
