"""`normfree demo`: the paper's central figure, from real networks and real photographs."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from normfree.cli.output import progress
from normfree.models.trunk import RESNET_DEPTHS
from normfree.signal import SignalReport, compare
from normfree.studies.signal_propagation import signal_propagation


def demo(depth: int = 50, seeds: int = 3, batch: int = 4, out: Path = Path("normfree-report")) -> None:
    """Characterize a ResNet with BatchNorm, with nothing, scaled only, and normalizer-free; draw the paper's figure.

    Args:
        depth: 26, 50, 101, 152, 200, 288 or 600.
        seeds: How many times to draw parameters and inputs anew.
        batch: Number of examples.
        out: Folder for index.html and index.png.
    """
    if depth not in RESNET_DEPTHS:
        raise ValueError(f"depth is {depth}; it must be one of {', '.join(map(str, RESNET_DEPTHS))}")
    out.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task("", total=10)

        def advance(what: str) -> None:
            bar.update(task, description=what)
            bar.advance(task)

        reports = signal_propagation(depth, seeds=seeds, batch=batch, advance=advance)
        advance("drawing")
        figure = compare(reports, title=f"Signal propagation in ResNet-{depth} at initialisation")
        written = [figure.save(out / "index.html"), figure.save(out / "index.png")]
    console = Console()
    rows = [_row(report, label) for label, row in reports.items() for report in row]
    columns = ("network", "input", "variance, first to last block", "largest squared mean / variance", "verdict")
    if console.is_terminal:
        table = Table(*columns, header_style="bold", show_lines=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        print(*("\t".join(row) for row in (columns, *rows)), sep="\n")
    console.print("\n".join(f"written: {path}" for path in written), highlight=False, soft_wrap=True)


def _row(report: SignalReport, label: str) -> tuple[str, ...]:
    first, last = report[0].variance, report[len(report) - 1].variance
    shift = max(record.squared_mean / record.variance for record in report)
    return report.model, label, f"{first:.3g} to {last:.3g}", f"{shift:.2g}", report.verdicts[0]
