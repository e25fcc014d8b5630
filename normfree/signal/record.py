"""Numbers of a signal: one record per residual join, and the records of a model."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from normfree.errors import SignalError

STATISTICS = {
    "squared_mean": "Average channel squared mean",
    "variance": "Average channel variance",
    "residual_variance": "Residual average channel variance",
    "gradient_squared_mean": "Gradient: squared mean",
    "gradient_variance": "Gradient: variance",
    "gradient_residual_variance": "Gradient: residual variance",
}
"""Fields of `SignalRecord` that are measured, and their titles in figures."""


def mean_to_variance(squared_mean: float, variance: float) -> float:
    """Divide a channel squared mean by a channel variance: 0 where the signal is 0, infinite where it is constant."""
    if variance == 0:
        return math.inf if squared_mean else 0.0
    return squared_mean / variance


@dataclass(frozen=True)
class SignalRecord:
    """Statistics of one residual join (in a model without joins, of one weight layer); means over the seeds.

    Attributes:
        name: Path of the module in which the addition happens; "#2" for its second one.
        stage: Number from 1; a new stage begins where the shape changes.
        shape: Shape of the sum, batch first.
        shortcut: "identity", "projection", "pooling", "padding" or "elementwise"; "fusion" where equals are added
            (feature pyramids, sums in U-Nets), and no term is a shortcut; "none" for a weight layer.
        squared_mean: Average channel squared mean.
        variance: Average channel variance.
        residual_variance: Variance at the end of the branch, before it is scaled; None where that cannot be had.
        expected_variance: Variance that the model's ledger predicts, where it declares that.
        gradient_squared_mean: Average channel squared mean of the gradient, with backward=True.
        gradient_variance: Average channel variance of the gradient.
        gradient_residual_variance: Variance of the gradient with respect to the end of the branch.
        predicted_squared_mean: Squared mean that follows from weights and structure, with predict=True.
        predicted_variance: Variance that follows from them; both are None behind an operation that has no rule.
        samples: Statistic -> one value per seed.
    """

    name: str
    stage: int
    shape: tuple[int, ...]
    shortcut: str
    squared_mean: float
    variance: float
    residual_variance: float | None
    expected_variance: float | None = None
    gradient_squared_mean: float | None = None
    gradient_variance: float | None = None
    gradient_residual_variance: float | None = None
    predicted_squared_mean: float | None = None
    predicted_variance: float | None = None
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def std(self, statistic: str) -> float:
        """Sample standard deviation of a statistic over the seeds; 0 for a single one, NaN if one is not finite."""
        values = self.samples.get(statistic, ())
        if not all(map(math.isfinite, values)):
            return math.nan
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def mean_to_variance(self) -> float:
        """Channel squared mean over channel variance."""
        return mean_to_variance(self.squared_mean, self.variance)


@dataclass(frozen=True)
class SignalRecords:
    """Records of one model, in the order in which it runs: iterate over them."""

    model: str
    inputs: str  # shapes
    kind: str  # of the records: "join" or "weight layer"
    records: tuple[SignalRecord, ...]
    opened: tuple[str, ...] = ()  # parameters that were set to one for the measurement
    normalizers: tuple[str, ...] = ()  # classes of the model's normalizers
    standardized: bool = False  # whether convolutions of the model standardize their weights
    seeds: int = 1
    assumptions: tuple[str, ...] = ()  # of the prediction
    unpredicted: tuple[str, ...] = ()  # operations that have no rule, and their modules

    @classmethod
    def merge(cls, reports: Sequence[Self]) -> Self:
        """Average several seeds: means, and the values behind them as `samples`.

        Raises SignalError when the seeds' networks differ in their records.
        """
        first = reports[0]
        names = [[record.name for record in report] for report in reports]
        if any(other != names[0] for other in names):
            raise SignalError(f"{first.model} has other joins with another seed: they cannot be averaged")
        merged = []
        for rows in zip(*reports, strict=True):
            samples = {}
            for statistic in STATISTICS:
                values = [getattr(row, statistic) for row in rows]
                if None not in values:
                    samples[statistic] = tuple(values)
            means = {name: statistics.fmean(samples[name]) if name in samples else None for name in STATISTICS}
            for name in ("predicted_squared_mean", "predicted_variance"):
                values = [getattr(row, name) for row in rows]
                means[name] = None if None in values else statistics.fmean(values)
            merged.append(dataclasses.replace(rows[0], samples=samples, **means))
        return dataclasses.replace(first, records=tuple(merged), seeds=len(reports))

    def __iter__(self) -> Iterator[SignalRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> SignalRecord:
        return self.records[index]

    @property
    def closed(self) -> list[str]:
        """Names of the joins whose branch is 0 and could not be opened, such as FixUp's zero convolutions."""
        return [record.name for record in self if record.residual_variance == 0]

    @property
    def predicted(self) -> list[tuple[float, float] | None]:
        """Squared mean and variance of each record that follow from weights and structure, with predict=True.

        None behind an operation that has no rule; the list is empty where no prediction was asked for.
        """
        known = [(record.predicted_squared_mean, record.predicted_variance) for record in self]
        if not self.assumptions and not self.unpredicted:
            return []
        return [None if mean is None or variance is None else (mean, variance) for mean, variance in known]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a dictionary of plain values per record."""
        return [
            dataclasses.asdict(record) | {"shape": list(record.shape), "samples": dict(record.samples)}
            for record in self
        ]
