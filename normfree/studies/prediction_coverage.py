"""Predictions from weights and structure beside what is measured, for other people's networks: docs/predictions.md.

    python -m normfree.studies.prediction_coverage --out docs/predictions.md [--networks timm:resnet18 …] [--seed 0]

The networks are those of `normfree.studies.coverage`, with random weights, before any conversion, on white noise.
"""

import argparse
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from normfree.files.whole import write_whole
from normfree.signal import SignalReport, characterize
from normfree.signal.measurement import characterize_on_tape
from normfree.sources import model_factory
from normfree.studies.coverage import NETWORKS, image_size
from normfree.trace.operations import GATES

BATCH = 32
_PRODUCTS = ("bmm", "_scaled_dot_product")  # of activations
TOLERANCE = 0.10  # of the measured variance


@dataclass(frozen=True)
class Predicted:
    """Prediction and measurement of one network."""

    network: str
    gates: bool  # attention, softmax or sigmoid gates among its operations
    records: int
    departures: tuple[float, ...]  # of the variance at each record that is predicted, over the measured one, less 1
    first: str  # record that departs by more than the tolerance, or nothing
    ends_at: str  # operation without a rule, or nothing

    @property
    def holds(self) -> bool:
        """True where every record is predicted, and within the tolerance."""
        return not self.first and len(self.departures) == self.records


def measure(network: str, seed: int = 0) -> Predicted:
    """Build a network, and compare its signal with what is predicted."""
    torch.manual_seed(seed)
    model = model_factory(network)()
    x = torch.randn(BATCH, 3, image_size(network), image_size(network))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = characterize_on_tape(model, x[:2])[1].nodes
        gates = any(node.op in GATES or (node.op.startswith(_PRODUCTS) and not node.weight_layer) for node in nodes)
        report = characterize(model, x, predict=True)
    return _compared(network, gates, report)


def _compared(network: str, gates: bool, report: SignalReport) -> Predicted:
    departures = {
        record.name: record.predicted_variance / record.variance - 1
        for record in report
        if record.predicted_variance is not None and record.variance > 0
    }
    first = next((name for name, departure in departures.items() if not abs(departure) <= TOLERANCE), "")
    ends_at = report.unpredicted[0] if report.unpredicted and None in report.predicted else ""
    return Predicted(network, gates, len(report), tuple(departures.values()), first, ends_at)


def to_markdown(rows: Sequence[Predicted]) -> str:
    """Return the page: what was compared, how many hold, and the table."""
    plain = [row for row in rows if not row.gates]
    holding = sum(row.holds for row in plain)
    lines = [
        f"# What is predicted of {len(rows)} networks",
        "",
        "Written by `python -m normfree.studies.prediction_coverage --out docs/predictions.md`; a test measures some "
        "of them again.",
        "",
        f"Networks of timm and torchvision with random weights, as they come, on {BATCH} images of white noise (96 "
        "pixels, 224 where a network needs it). The variance at every residual join, or at every weight layer of "
        "networks without joins, is measured, and predicted from weights and structure alone "
        "([how](signal.md#before-it-runs)).",
        "",
        "- *departure*: the predicted variance over the measured one, less 1: the mean of its size, and the largest",
        f"- *first beyond*: the first record where that is more than {TOLERANCE:.0%}",
        "- *ends at*: an operation that has no rule, after which nothing is predicted",
        "",
        f"Within {TOLERANCE:.0%} at every record: {holding} of the {len(plain)} networks without attention, softmax "
        f"or sigmoid gates, and {sum(row.holds for row in rows) - holding} of the {len(rows) - len(plain)} with them.",
        "",
        "| network | gates | records | predicted | mean departure | largest | first beyond | ends at |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n\n" + _WHY


def _line(row: Predicted) -> str:
    sizes = [abs(departure) for departure in row.departures]
    mean, largest = (f"{statistics.fmean(sizes):.1%}", f"{max(sizes):.1%}") if sizes else ("–", "–")
    cells = (
        f"`{row.network}`", "yes" if row.gates else "", str(row.records), str(len(sizes)), mean, largest,
        f"`{row.first}`" if row.first else "", row.ends_at,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


_WHY = """## Where it departs

The prediction takes what a layer adds up as uncorrelated. Random filters make that true on the average over channels,
so most networks are predicted to a percent. It fails where values that are alike are averaged or added up:

- pooling, blurring or averaging of what was pooled before (blurred ResNets, Inception, the average over all positions
  before a classifier, whose logits count as a record only in networks without joins): the average keeps more variance
  than that of independent values;
- sums of branches that share values (FastViT and RepViT, where an identity and convolutions of it are added or
  subtracted and normalized again);
- few channels: a depthwise filter's own correlations do not average out.

Softmax over activations, products of two activations as in attention, and interpolation have no rule: the prediction
ends there.
"""


def main() -> None:
    """Measure the networks and write the page, as far as it is known, after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for network in options.networks:
        rows.append(measure(network, options.seed))
        worst = max(map(abs, rows[-1].departures), default=math.nan)
        print(f"{network}: {worst:.1%} {rows[-1].first} {rows[-1].ends_at}", flush=True)
        write_whole(options.out, to_markdown(rows))


if __name__ == "__main__":
    main()
