"""Verdicts on a signal, in words: the first place where something goes wrong, and the cause."""

import math
import statistics
from collections.abc import Callable, Iterable
from itertools import groupby, pairwise

from normfree.signal.record import SignalRecord, SignalRecords
from normfree.signal.remedies import Verdict

# Where the words begin: beyond these a network does not train, or only with care.
EXPLODED = 100.0
VANISHED = 0.01
DRIFTED = 1.0
DEPARTED = 1.25


_START_SMALL = (
    "inputs of mean 0 and variance 1, finite weights of variance 1/fan-in, as `normfree.nn.ScaledWSConv2d` has them by "
    "construction",
    "networks.md#one-idea-normalization-lives-in-the-weights",
)


def _bounded(report: SignalRecords) -> tuple[str, str]:
    """Return what bounds the signal of such a network, and the page that explains it."""
    if report.normalizers:
        names = " and ".join(report.normalizers)
        return (
            f"`normfree.convert(model, images)` puts standardized weights in the place of {names} and scales the "
            "branches as they add up",
            "convert.md#what-is-done",
        )
    if report.standardized:
        return (
            "scale each branch as it is added: `alpha=0.2` bounds the growth in our networks; elsewhere "
            "`skip_gain=0.0` and `out_scale=0.2` of the branch's last `normfree.nn.ScaledWSConv2d`",
            "networks.md#one-idea-normalization-lives-in-the-weights",
        )
    return (
        "`normfree.nn.ScaledWSConv2d` in the place of convolutions, with `in_scale=normfree.gain(activation)`, and "
        "`out_scale=0.2` at the last one of each branch",
        "networks.md#one-idea-normalization-lives-in-the-weights",
    )


def find_verdicts(report: SignalRecords) -> list[Verdict]:
    """Return sentences on the records; see `SignalReport.verdicts`."""
    words: list[Verdict] = []
    if report.kind != "join":
        words.append(Verdict(f"{report.model} has no residual joins: there is one record per weight layer"))
    problem = _not_finite(report)
    if problem is not None:
        return [*words, Verdict(problem, *_START_SMALL)]
    found = [_too_large(report, EXPLODED), _too_small(report, VANISHED), _drift(report, DRIFTED)]
    problems = [None if words is None else Verdict(words, *_bounded(report)) for words in found]
    if problems[2] is not None and report.standardized:
        problems[2] = Verdict(problems[2])  # nothing to be mended
    findings = [*problems, _against_the_ledger(report), _against_the_prediction(report), _linear_growth(report)]
    words += [finding for finding in findings if finding is not None]
    if not any(problems):
        variance, mean = _range(r.variance for r in report), max(record.mean_to_variance for record in report)
        words.append(
            Verdict(
                f"the signal neither explodes, vanishes nor drifts: variance {variance}, squared mean at most "
                f"{_number(mean)} of the variance"
            )
        )
    if report.closed:
        words.append(
            Verdict(
                f"{len(report.closed)} branches have variance 0 and cannot be opened, {report.closed[0]} the first: "
                "zero weights, or a single position",
                "start their last weights as the others, and close the branch by a gain instead (`skip_gain=0.0`; "
                "`skip_gain=None` leaves it open), or measure on larger images",
                "networks.md#one-idea-normalization-lives-in-the-weights",
            )
        )
    return words


def first_problem(
    report: SignalRecords,
    *,
    max_variance: float | None,
    max_mean_to_std: float | None,
    min_residual: float | None,
) -> str | None:
    """Say which limit is violated first, or None; see `SignalReport.check`."""
    problem = _not_finite(report)
    if problem is None and max_variance is not None:
        problem = _too_large(report, max_variance)
    if problem is None and max_mean_to_std is not None:
        problem = _drift(report, max_mean_to_std)
    if problem is None and min_residual is not None:
        record = _first(report, lambda r: r.residual_variance is not None and r.residual_variance < min_residual)
        if record is not None:
            cause = ": the branch adds nothing to its shortcut" if (record.residual_variance or 0) < VANISHED else ""
            value, limit = _number(record.residual_variance or 0.0), _number(min_residual)
            problem = f"residual variance is {value} at {record.name}, below {limit}{cause}"
    return problem


def _not_finite(report: SignalRecords) -> str | None:
    record = _first(report, lambda r: not math.isfinite(r.squared_mean + r.variance))
    return None if record is None else f"the signal is not finite from {record.name} on"


def _too_large(report: SignalRecords, limit: float) -> str | None:
    record = _first(report, lambda r: r.variance > limit)
    if record is None:
        return None
    words = f"variance passes {_number(limit)} at {record.name} ({_number(record.variance)})"
    if record.variance <= EXPLODED:
        return words
    growth = _growth_per_record(report)
    if growth > 1.05:
        words += f", growing by a factor of {growth:.2f} per {report.kind}"
    if report.kind != "join":
        return words
    if report.normalizers:
        return f"{words}: {' and '.join(report.normalizers)} bound the branches, not their sum"
    if report.standardized:
        return f"{words}: the weights are standardized, but the blocks are not scaled down as they add up"
    return f"{words}: nothing normalizes the branches or scales them down"


def _too_small(report: SignalRecords, limit: float) -> str | None:
    # The last layer's outputs are logits, which may well start small.
    records = [record for record in report if report.kind == "join" or len(record.shape) > 2]
    record = next((record for record in records if record.variance < limit), None)
    if record is None:
        return None
    return f"variance falls below {_number(limit)} at {record.name} ({_number(record.variance)}): the signal vanishes"


def _drift(report: SignalRecords, ratio: float) -> str | None:
    """Say where √(squared mean / variance) passes `ratio`, and why."""
    record = _first(report, lambda r: r.squared_mean > ratio**2 * r.variance)
    if record is None:
        return None
    if ratio == 1:
        words = f"channel squared mean passes the variance at {record.name}"
    else:
        value = math.sqrt(record.mean_to_variance)
        words = f"√(squared mean / variance) is {_number(value)} at {record.name}, above {_number(ratio)}"
    if record.squared_mean <= DRIFTED * record.variance:
        return words
    if report.standardized:
        return f"{words}: standardized weights, whose filters have mean 0, take it out again"
    if not report.normalizers:
        return f"{words}: activations drift, the convolutions after them are not standardized"
    if report.kind != "join":
        return words
    return f"{words}: {report.normalizers[0]} centers the branches, not the shortcut that they are added to"


def _against_the_ledger(report: SignalRecords) -> Verdict | None:
    known = [(r, r.variance / r.expected_variance) for r in report if r.expected_variance]
    if not known:
        return None
    low, high = min(ratio for _, ratio in known), max(ratio for _, ratio in known)
    if low >= 0.75 and high <= 1.25:
        within = max(1 - low, high - 1)
        return Verdict(f"variance follows the prediction, growing by α² per block from 1, within {within:.0%}")
    if low >= 0.25 and high <= min(4, 1.5 * low):
        return Verdict(
            f"variance follows the prediction, growing by α² per block, at {low:.2f} to {high:.2f} of its size, as it "
            "may where inputs are not white noise of unit variance"
        )
    record, _ = max(known, key=lambda item: abs(math.log(max(item[1], 1e-300))))
    return Verdict(
        f"variance departs from the prediction: {_number(record.variance)} at {record.name}, expected "
        f"{_number(record.expected_variance or 0.0)}",
        "standardized weights, the γ of its activation and β at each branch (`standardize`, `gamma` and `beta` left as "
        "they are in `create_model`), weights as they begin, and inputs of mean 0 and variance 1",
        "networks.md#one-idea-normalization-lives-in-the-weights",
    )


def _against_the_prediction(report: SignalRecords) -> Verdict | None:
    """Say where the variance departs from what follows from weights and structure, or that it does not."""
    known = [r for r in report if r.predicted_variance is not None and r.variance > 0]
    stopped = f"; the prediction ends at {report.unpredicted[0]}" if report.unpredicted else ""
    if not known:
        return Verdict(f"nothing is predicted{stopped}") if stopped else None
    ratios = {r.name: r.variance / max(r.predicted_variance or 0.0, 1e-300) for r in known}
    first = next((r for r in known if not 1 / DEPARTED < ratios[r.name] < DEPARTED), None)
    if first is None:
        most = max(abs(ratio - 1) for ratio in ratios.values())
        at = f"within {most:.0%} at {len(known)} records"
        return Verdict(f"variance is what follows from weights and structure, {at}{stopped}")
    ratio = ratios[first.name]
    cause = (
        "pooling of what is correlated over positions"
        if first.shortcut == "pooling"
        else "weights, or inputs, are not as random as it assumes"
    )
    return Verdict(
        f"variance departs from its prediction first at {first.name}, by {max(ratio, 1 / ratio):.1f} times "
        f"({_number(first.variance)}, predicted {_number(first.predicted_variance or 0.0)}): {cause}{stopped}",
        "measure white noise (`inputs=None`) with new weights: what then still departs is the structure of that block; "
        "what does not is what was learned, or what the images have in common",
        "signal.md#before-it-runs",
    )


def _linear_growth(report: SignalRecords) -> Verdict | None:
    """Growth by a constant amount per block that starts anew with each stage: what BatchNorm does to a ResNet."""
    steps, resets, last = [], [], None
    for _, group in groupby(report, key=lambda r: r.stage):
        stage = list(group)
        # With activations after the addition a stage's first sum has two normalized terms, so it stands out.
        regular = stage[1:] if len(stage) > 2 else stage
        steps += [b.variance - a.variance for a, b in pairwise(regular)]
        if last is not None and stage[0].variance < last:
            resets.append(stage[0].name)
        last = stage[-1].variance
    if not report.normalizers or len(steps) < 3 or not resets or min(steps) <= 0:
        return None
    step = statistics.fmean(steps)
    if statistics.pstdev(steps) > 0.25 * step:
        return None
    return Verdict(
        f"variance grows linearly within a stage, by {_number(step)} per block, and is reset at {', '.join(resets)}: "
        f"{report.normalizers[0]} bounds each branch, so the shortcut weighs more with depth",
        *_bounded(report),
    )


def _growth_per_record(report: SignalRecords) -> float:
    first, last = report[0].variance, report[len(report) - 1].variance
    return (last / first) ** (1 / (len(report) - 1)) if len(report) > 1 and first > 0 else 1.0


def _first(report: SignalRecords, wrong: Callable[[SignalRecord], bool]) -> SignalRecord | None:
    return next((record for record in report if wrong(record)), None)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _range(values: Iterable[float]) -> str:
    known = list(values)
    return f"{_number(min(known))} to {_number(max(known))}"
