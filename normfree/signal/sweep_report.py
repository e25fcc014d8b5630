"""The report of a sweep: slopes, verdicts, figure and file."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.arguments import checked
from normfree.errors import SignalError
from normfree.files.csv_tables import csv_text
from normfree.files.whole import write_whole
from normfree.plotting import write_chart
from normfree.signal.remedies import Verdict
from normfree.signal.sweep_figure import sweep_chart
from normfree.signal.sweep_point import QUANTITIES, Place, has_logarithm

# Beyond this exponent a quantity is said to grow or to shrink.
STEEP = 0.2
_PAGE = "signal.md#over-widths-and-depths"


@dataclass(frozen=True)
class Slope:
    """Exponent with which a quantity of a place grows with an argument: quantity ~ argument^exponent.

    Attributes:
        quantity: Name of the quantity, among "rms", "variance", "rms_after" and "change".
        kind: Kind of the place, "join" or "weight layer".
        name: Name of the place; "the last join" where the networks have other ones.
        exponent: Mean over the seeds, and over the values of the other arguments, of the least-squares fit of
            logarithms.
        std: Standard deviation of that.
    """

    quantity: str
    kind: str
    name: str
    exponent: float
    std: float


@dataclass(frozen=True)
class SweepReport:
    """Signal over the values of some arguments.

    Attributes:
        model: Name of the factory.
        over: Names of the arguments, and the values of each; slopes are those over the first.
        steps: Steps between the two measurements.
        networks: One triple for each network: its arguments, its seed, and its places.
        of_network: Whether the first argument is one of the network, over which a learning rate may transfer, and not
            of the data or the optimizer alone.
    """

    model: str
    over: Mapping[str, Sequence[Any]]
    steps: int
    networks: Sequence[tuple[Mapping[str, Any], int, Sequence[Place]]]
    of_network: bool = True

    @property
    def argument(self) -> str:
        """Name of the argument that slopes are over."""
        return next(iter(self.over))

    @property
    def slopes(self) -> list[Slope]:
        """Slopes of every quantity at every place that all networks have; none for values without logarithm."""
        values = self.over[self.argument]
        if len(values) < 2 or not all(has_logarithm(value) for value in values):
            return []
        series: dict[tuple[str, str, str], dict[Any, list[tuple[float, float]]]] = {}
        for point, seed, kind, name, place in self._common_places():
            others = tuple(str(value) for key, value in point.items() if key != self.argument)
            for quantity, number in place.numbers.items():
                if 0 < number < math.inf:
                    points = series.setdefault((quantity, kind, name), {}).setdefault((others, seed), [])
                    points.append((math.log(point[self.argument]), math.log(number)))
        found = []
        for (quantity, kind, name), fits in series.items():
            slopes = [
                statistics.linear_regression(*zip(*points, strict=True)).slope
                for points in fits.values()
                if len(points) == len(values)
            ]
            if slopes:
                std = statistics.stdev(slopes) if len(slopes) > 1 else 0.0
                found.append(Slope(quantity, kind, name, statistics.fmean(slopes), std))
        return found

    def _common_places(self) -> list[tuple[Mapping[str, Any], int, str, str, Place]]:
        """Return the places that all networks have, by their names; the last ones where these differ."""
        common = set.intersection(*({(p.kind, p.name) for p in places} for _, _, places in self.networks))
        lasts = [{place.kind: place for place in places} for _, _, places in self.networks]
        differing = {
            kind for kind in set.intersection(*map(set, lasts)) if len({last[kind].name for last in lasts}) > 1
        }
        found = []
        for (point, seed, places), last in zip(self.networks, lasts, strict=True):
            for place in places:
                if (place.kind, place.name) in common:
                    found.append((point, seed, place.kind, place.name, place))
            for kind in sorted(differing):
                found.append((point, seed, kind, f"the last {kind}", last[kind]))
        return found

    @property
    def verdicts(self) -> list[Verdict]:
        """Sentences on the slopes: what grows or shrinks with the argument, and what that means."""
        for point, seed, places in self.networks:
            for place in places:
                if not all(map(math.isfinite, place.numbers.values())):
                    where = ", ".join(f"{name} {value}" for name, value in point.items())
                    return [
                        Verdict(
                            f"the signal is not finite at {place.name} with {where}, seed {seed}",
                            "a lower learning rate, or fewer steps", _PAGE,
                        )
                    ]  # fmt: skip
        if not self.slopes:
            return [Verdict(f"{self.argument} has no two values with logarithms: there are no slopes")]
        words = [self._growth("rms", "the signal at initialisation")]
        if self.steps:
            words.append(self._growth("change", f"the change after {self.steps} step{'s' * (self.steps > 1)}"))
        return words

    def _growth(self, quantity: str, what: str) -> Verdict:
        argument = self.argument
        slopes = [slope for slope in self.slopes if slope.quantity == quantity]
        if not slopes:
            return Verdict(f"{what} is 0 everywhere")
        steepest = max(slopes, key=lambda slope: abs(slope.exponent))
        if abs(steepest.exponent) <= STEEP:
            low, high = min(s.exponent for s in slopes), max(s.exponent for s in slopes)
            end = ": the learning rate transfers" if quantity == "change" and self.of_network else ""
            return Verdict(f"{what} does not depend on {argument}: exponents {low:.2f} to {high:.2f}{end}")
        steep = sum(abs(slope.exponent) > STEEP for slope in slopes)
        verb = "grows" if steepest.exponent > 0 else "shrinks"
        words = f"{what} of {steepest.name} {verb} as {argument}^{steepest.exponent:.2f}"
        words += f", the steepest of {steep} of {len(slopes)} places" if steep > 1 else ""
        if not self.of_network:
            return Verdict(words)
        if quantity == "change":
            return Verdict(
                f"{words}: the learning rate does not transfer",
                "learning rates that fall with the fan-in of each layer (µP: parameter groups, a function of the model "
                "as optimizer=), and an output layer that starts with 1/fan-in",
                _PAGE,
            )
        return Verdict(
            words,
            "weights of variance 1/fan-in (`normfree.nn` layers have it by construction, `normfree.convert(model, "
            "images)` gives it), and branches that are scaled down as they add up (alpha, SkipInit)",
            _PAGE,
        )

    @checked
    def check(self, *, max_growth: float | None = None, max_change_growth: float | None = None) -> None:
        """Raise SignalError where something grows or shrinks faster than it may, or is not finite.

        Args:
            max_growth: Largest exponent, up or down, of the signal at initialisation.
            max_change_growth: Largest exponent of its change.
        """
        if self.verdicts[0].startswith("the signal is not finite"):
            raise SignalError(f"{self.model}: {self.verdicts[0]}")
        for quantity, limit in (("rms", max_growth), ("change", max_change_growth)):
            for slope in self.slopes:
                if limit is not None and slope.quantity == quantity and abs(slope.exponent) > limit:
                    power = f"{self.argument}^{slope.exponent:.2f}"
                    raise SignalError(f"{self.model}: {quantity} of {slope.name} goes as {power}, beyond {limit:.3g}")

    @checked
    def save(self, path: str | Path) -> Path:
        """Write a figure (.png, .svg, .html) or the numbers (.csv, .json). Returns the path.

        Raises ValueError for another suffix, OSError where it cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        rows = self.to_dicts()
        if suffix == ".csv":
            write_whole(path, csv_text(list(rows[0]), rows))
        elif suffix == ".json":
            slopes = [vars(slope) for slope in self.slopes]
            document = {"model": self.model, "steps": self.steps, "verdicts": self.verdicts, "slopes": slopes}
            document["rows"] = [
                {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
                for row in rows
            ]
            write_whole(path, json.dumps(document, indent=1, default=str) + "\n")
        else:
            write_chart(sweep_chart(self, rows), path)
        return path

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a dictionary of plain values per network and place."""
        return [
            dict(point) | {"seed": seed, "kind": p.kind, "position": p.position, "place": p.name} | dict(p.numbers)
            for point, seed, places in self.networks
            for p in places
        ]

    def __str__(self) -> str:
        """Return a table of slopes, and the verdicts."""
        exponents: dict[tuple[str, str], dict[str, str]] = {}
        for slope in self.slopes:
            shown = f"{slope.exponent:.2f} ± {slope.std:.2f}"
            exponents.setdefault((slope.kind, slope.name), {})[slope.quantity] = shown
        columns = [name for name in QUANTITIES if self.steps or name in ("rms", "variance")]
        table = [["place", "", *columns]]
        table += [
            [name, kind, *(row.get(column, "–") for column in columns)] for (kind, name), row in exponents.items()
        ]
        widths = [max(len(row[i]) for row in table) for i in range(len(columns) + 2)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        title = f"{self.model} over {self.argument}: exponents of {len(self.networks)} networks"
        return "\n".join([title, *(lines if exponents else []), *(f"· {verdict}" for verdict in self.verdicts)])
