"""The report of a measurement: records, what can be said of them, and how they are shown and saved."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.arguments import checked, require_moderate
from normfree.errors import SignalError
from normfree.signal import table
from normfree.signal.record import SignalRecords
from normfree.signal.remedies import Verdict
from normfree.signal.verdicts import find_verdicts, first_problem


@dataclass(frozen=True)
class SignalReport(SignalRecords):
    """Signal propagation of one model: iterate over it for its records.

    Attributes:
        model: Name of the model.
        inputs: Shapes of the inputs.
        kind: Kind of the records, "join" or "weight layer".
        records: One `SignalRecord` per join or layer.
        opened: Parameters that were set to one for the measurement.
        normalizers: Classes of the model's normalizers.
        standardized: Whether convolutions of the model standardize their weights.
        seeds: Number of measurements that were averaged.
    """

    @property
    def verdicts(self) -> list[Verdict]:
        """Sentences on the numbers: what goes wrong, where first, and why; or that nothing does.

        Each is a string, with `remedy`, what to do about it, and `page`, where the documents explain that.
        """
        return find_verdicts(self)

    @checked
    def check(
        self,
        *,
        max_variance: float | None = None,
        max_mean_to_std: float | None = None,
        min_residual: float | None = None,
    ) -> None:
        """Raise SignalError at the first record outside the limits, or not finite; for people's own tests.

        Args:
            max_variance: Largest average channel variance.
            max_mean_to_std: Largest √(squared mean / variance).
            min_residual: Least residual average channel variance.

        Raises:
            SignalError: With the model, the place and the cause.
        """
        require_moderate(max_variance=max_variance, max_mean_to_std=max_mean_to_std, min_residual=min_residual)
        problem = first_problem(
            self, max_variance=max_variance, max_mean_to_std=max_mean_to_std, min_residual=min_residual
        )
        if problem is not None:
            raise SignalError(f"{self.model}: {problem}")

    @checked
    def save(self, path: str | Path) -> Path:
        """Write the report where its suffix says: .html, .png, .svg (charts), .md, .csv, .json. Returns the path.

        Raises ValueError for another suffix, OSError where the file cannot be written, ImportError for charts without
        the extra "charts".
        """
        from normfree.signal.figure import compare

        return compare([self]).save(path)

    def __rich__(self) -> Any:
        return table.rich_table(self)

    def __str__(self) -> str:
        """Return a table: rich's where standard output is a terminal, plain lines where it is a pipe or a file."""
        return table.rich_text(self) if sys.stdout.isatty() else table.plain_text(self)

    def _repr_html_(self) -> str:
        from normfree.signal.figure import compare

        return compare([self])._repr_html_()
