"""Learning curves of runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfree.files.csv_tables import read_csv, reading_rows
from normfree.plotting import COLORS, altair, write_chart
from normfree.training.recipes import Recipe
from normfree.training.run.folder import RECIPE


def draw_curves(runs: Sequence[Path], path: Path) -> Path:
    """Draw loss and accuracy over the steps of each run folder, as .png, .svg or .html.

    Raises ValueError for another suffix, ImportError without the extra "charts", OSError for a folder without metrics.
    """
    return write_chart(
        _chart(altair(), [point for run in runs for point in read_curves(run)], len(runs) > 1).to_dict(), path
    )


def read_curves(run: Path) -> list[dict[str, Any]]:
    """Read loss and accuracy of a run's folder, one dictionary each: run, of, step, what, value.

    They are of training, test or, where the run is tested on those images, validation.
    """
    _, rows = read_csv(run / "metrics.csv")
    if not rows:
        raise OSError(f"{run} has no metrics.csv with rows")
    tested = Recipe.from_json(run / RECIPE).test_on if (run / RECIPE).exists() else "test"
    kinds = {"train": "training", "eval": tested, "eval_ema": f"{tested}, averaged"}
    with reading_rows(run / "metrics.csv"):
        return [
            {
                "run": run.name,
                "of": kinds[row["kind"]],
                "step": int(row["step"]),
                "what": what,
                "value": float(row[what]),
            }
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
