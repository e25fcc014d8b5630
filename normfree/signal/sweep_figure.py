"""The figure of a sweep: a panel per quantity, a line per place, a slope for each."""

import math
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from normfree.plotting import COLORS, altair
from normfree.signal.sweep_point import QUANTITIES, has_logarithm

_NAMED = 8  # lines that a legend can name
_WIDTH = 150  # characters of a line of the title


def sweep_chart(report: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make the Vega-Lite specification: root mean squares over the argument, logarithmic; bands over the seeds."""
    alt = altair()
    exponents = {(s.quantity, s.kind, s.name): s.exponent for s in report.slopes}
    shown = [name for name in QUANTITIES if report.steps or name == "rms"]
    panels = [
        panel
        for quantity in shown
        if quantity != "variance"
        for panel in [_panel(alt, report, rows, quantity, exponents)]
        if panel is not None
    ]
    verdicts = [line for verdict in report.verdicts for line in textwrap.wrap(verdict, _WIDTH)]
    chart = alt.hconcat(*panels, spacing=28).resolve_scale(color="independent")
    title = alt.Title(
        f"{report.model} over {report.argument}", subtitle=verdicts, anchor="start", fontSize=16, offset=12
    )
    return dict(
        chart.properties(title=title)
        .configure_legend(orient="bottom", direction="vertical", labelLimit=0, titleLimit=0)
        .configure_view(stroke="#cccccc")
        .to_dict()
    )


def _panel(alt: Any, report: Any, rows: Sequence[dict[str, Any]], quantity: str, exponents: dict[Any, float]) -> Any:
    argument = report.argument
    groups = defaultdict(list)
    for row in rows:
        others = ", ".join(f"{name} {row[name]}" for name in report.over if name != argument)
        groups[row["kind"], row["place"], row["position"], others, row[argument]].append(row[quantity])
    values = []
    for (kind, name, position, others, at), numbers in groups.items():
        known = [number for number in numbers if 0 < number < math.inf]
        if not known:
            continue
        exponent = exponents.get((quantity, kind, name))
        slope = "" if exponent is None else f": {argument}^{exponent:.2f}"
        label = f"{name}{' (join)' if kind == 'join' else ''}{f', {others}' if others else ''}{slope}"
        values.append(
            {
                argument: at, "place": label, "position": position, "value": statistics.geometric_mean(known),
                "low": min(known), "high": max(known),
            }
        )  # fmt: skip
    if not values:
        return None
    numeric = all(map(has_logarithm, report.over[argument]))
    x = (
        alt.X(f"{argument}:Q", axis=alt.Axis(values=list(report.over[argument]))).scale(
            type="log", nice=False, padding=12
        )
        if numeric
        else (alt.X(f"{argument}:O", sort=list(map(str, report.over[argument]))))
    )
    places = list(dict.fromkeys(value["place"] for value in values))
    color = (
        alt.Color("place:N", title=None, sort=places, legend=alt.Legend(symbolOpacity=1)).scale(range=COLORS)
        if len(places) <= _NAMED
        else alt.Color("position:Q", title="position").scale(scheme="viridis")
    )
    log = alt.Scale(type="log")
    title = QUANTITIES[quantity]
    if quantity == "change":
        title += f" after {report.steps} step{'s' * (report.steps > 1)}"
    base = alt.Chart(alt.Data(values=values), width=320, height=260, title=title).encode(x=x, detail="place:N")
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title=None).scale(log), y2="high:Q", color=color)
    line = base.mark_line(point=True).encode(
        y=alt.Y("value:Q", title="root mean square").scale(log), color=color,
        tooltip=["place:N", f"{argument}:N", alt.Tooltip("value:Q", format=".4g")],
    )  # fmt: skip
    return band + line
