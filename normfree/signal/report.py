"""What was measured, block by block, and what can be said of it."""

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normfree.errors import SignalError
from normfree.signal import verdicts

STATISTICS = (
    "squared_mean",
    "variance",
    "residual_variance",
    "gradient_squared_mean",
    "gradient_variance",
    "gradient_residual_variance",
)


@dataclass(frozen=True)
class SignalRecord:
    """One residual join (or, in a model without joins, one weight layer); means over the seeds.

    name                    path of the module in which the addition happens; "#2" for its second one
    stage                   from 1; a new one begins where the shape changes
    shape                   of the sum, batch first
    shortcut                identity, projection, pooling, padding or elementwise; "none" for a weight layer
    squared_mean            average channel squared mean
    variance                average channel variance
    residual_variance       the same at the end of the branch, before it is scaled; None where that cannot be had
    expected_variance       what the model's ledger predicts, where it declares that
    gradient_…              the same of the gradient, with backward=True; the residual one is that of the gradient with
                            respect to the end of the branch
    samples                 statistic -> one value per seed
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
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def std(self, statistic: str) -> float:
        """Sample standard deviation of a statistic over the seeds; 0 for a single one, NaN if one is not finite."""
        values = self.samples.get(statistic, ())
        if not all(map(math.isfinite, values)):
            return math.nan
        return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class SignalReport:
    """The signal propagation of one model: iterate over it for its records."""

    model: str
    inputs: str  # shapes
    kind: str  # of the records: "join" or "weight layer"
    records: tuple[SignalRecord, ...]
    opened: tuple[str, ...] = ()  # parameters that were set to one for the measurement
    normalizers: tuple[str, ...] = ()  # classes of the model's normalizers
    standardized: bool = False  # whether convolutions of the model standardize their weights
    seeds: int = 1

    @classmethod
    def merge(cls, reports: Sequence["SignalReport"]) -> "SignalReport":
        """One report of several seeds: means, and the values behind them as `samples`.

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
            merged.append(dataclasses.replace(rows[0], samples=samples, **means))
        return dataclasses.replace(first, records=tuple(merged), seeds=len(reports))

    def __iter__(self) -> Iterator[SignalRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> SignalRecord:
        return self.records[index]

    @property
    def verdicts(self) -> list[str]:
        """What the numbers say, in words: what goes wrong, where first, and why; or that nothing does."""
        return verdicts.verdicts(self)

    @property
    def closed(self) -> list[str]:
        """Names of the joins whose branch is 0 and could not be opened, such as FixUp's zero convolutions."""
        return [record.name for record in self if record.residual_variance == 0]

    def check(
        self,
        *,
        max_variance: float | None = None,
        max_mean_to_std: float | None = None,
        min_residual: float | None = None,
    ) -> None:
        """Raise SignalError at the first record outside the limits, or not finite; for people's own tests.

        max_variance      of the average channel variance
        max_mean_to_std   of √(squared mean / variance)
        min_residual      of the residual average channel variance
        """
        problem = verdicts.first_problem(
            self, max_variance=max_variance, max_mean_to_std=max_mean_to_std, min_residual=min_residual
        )
        if problem is not None:
            raise SignalError(f"{self.model}: {problem}")

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dictionary per record, of plain values."""
        return [
            dataclasses.asdict(record) | {"shape": list(record.shape), "samples": dict(record.samples)}
            for record in self
        ]

    def save(self, path: str | Path) -> Path:
        """Write the report where its suffix says: .html, .png, .svg (charts), .csv, .json. Returns the path.

        Raises ValueError for another suffix, OSError where the file cannot be written, ImportError for charts without
        the extra "charts".
        """
        from normfree.signal.figure import compare

        return compare([self]).save(path)

    def __rich__(self) -> Any:
        from normfree.signal.table import rich_table

        return rich_table(self)

    def __str__(self) -> str:
        """A table: rich's where standard output is a terminal, plain lines where it is a pipe or a file."""
        from normfree.signal import table

        return table.rich_text(self) if sys.stdout.isatty() else table.plain_text(self)

    def _repr_html_(self) -> str:
        from normfree.signal.figure import compare

        return compare([self])._repr_html_()
