"""`normfree demo`: the paper's central figure, from real networks and real photographs."""

from pathlib import Path

from normfree.cli.output import Json, announce, progress, show_json, show_table
from normfree.models.block_plan import RESNET_DEPTHS
from normfree.signal import SignalReport, compare


def demo(
    depth: int = 50,
    seeds: int = 3,
    batch: int = 4,
    epochs: int = 2,
    out: Path = Path("normfree-report"),
    json_output: Json = False,
) -> None:
    """Characterize a ResNet with BatchNorm, with nothing, scaled only, and normalizer-free; draw the paper's figure.

    Then train three of them on digits, four images at a time.

    Args:
        depth: 26, 50, 101, 152, 200, 288 or 600.
        seeds: How many times to draw parameters and inputs anew.
        batch: Number of examples.
        epochs: Passes of the training over the digits.
        out: Folder for index.html and index.png.
        json_output: Print the numbers as JSON.
    """
    from normfree.studies.demo import BATCH, TRAINED, accuracy_panel, measure_propagation, train_small_batches

    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1")
    if depth not in RESNET_DEPTHS:
        raise ValueError(f"depth is {depth}; it must be one of {', '.join(map(str, RESNET_DEPTHS))}")
    out.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task("", total=9 + len(TRAINED))

        def advance(what: str) -> None:
            bar.update(task, description=what)
            bar.advance(task)

        reports = measure_propagation(depth, seeds=seeds, batch=batch, advance=advance)
        trained = train_small_batches(epochs=epochs, advance=advance)
        advance("drawing")
        title = f"Signal propagation in ResNet-{depth} at initialisation"
        figure = compare(reports, title=title, below=[accuracy_panel(trained)])
        written = [figure.save(out / "index.html"), figure.save(out / "index.png")]
    if json_output:
        signal = {label: {report.model: report.to_dicts() for report in row} for label, row in reports.items()}
        show_json({"signal": signal, "trained": trained, "written": written})
        return
    flat = [(report, label) for label, row in reports.items() for report in row]
    show_table(
        ("network", "input", "variance, first block", "last block", "largest squared mean / variance"),
        [_row(report, label) for report, label in flat],
    )
    for report, label in flat:
        print(f"· {report.model} on {label}: {report.verdicts[0]}")
    for network in TRAINED:
        last = [point["accuracy"] for point in trained if point["network"] == network][-1:]
        reached = f"{last[0]:.1f} % after {epochs} epochs" if last else "the loss is not finite"
        print(f"· {network}, trained on digits {BATCH} images at a time: {reached}")
    announce(written)


def _row(report: SignalReport, label: str) -> tuple[str, ...]:
    shift = max(record.mean_to_variance for record in report)
    return report.model, label, f"{report[0].variance:.3g}", f"{report[len(report) - 1].variance:.3g}", f"{shift:.2g}"
