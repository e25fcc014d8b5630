"""Verdicts on a training, in words: what goes wrong with its signal, where, and from which step on."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normfree.signal.remedies import Verdict
from normfree.signal.verdicts import EXPLODED, VANISHED

# Where the words begin: fraction of a rectifier's channels; size of a step over that of its weight; quotient of two
# weights' such ratios.
DEAD = 0.1
LARGE_UPDATE = 0.1
UPDATE_SPREAD = 30.0

_Row = Mapping[str, Any]
_CLIP = (
    "a lower learning rate, a longer warmup, or adaptive gradient clipping (`clip_adaptive=0.01` in recipes, "
    "`timm.utils.adaptive_clip_grad` in other loops) keeps steps in proportion to their weights"
)
_PAGE = "training.md#what-goes-wrong-in-a-training"


def find_training_verdicts(rows: Sequence[_Row]) -> list[Verdict]:
    """Return sentences on the rows of a `SignalMonitor`; see `SignalMonitor.verdicts`."""
    not_finite = _not_finite(rows)
    if not_finite is not None:
        return [not_finite]
    found = [_exploded(rows), _vanished(rows), _died(rows), _closed(rows), _moves_far(rows), _moves_apart(rows)]
    return [verdict for verdict in found if verdict is not None]


def first_training_problem(rows: Sequence[_Row], limits: Mapping[str, float]) -> str | None:
    """Say which limit the last measured step violates first, or None; see `SignalMonitor.check`."""
    if not rows:
        return "the monitor has measured nothing yet"
    not_finite = _not_finite(rows)
    if not_finite is not None:
        return not_finite
    last = rows[-1]["step"]
    for name, limit in limits.items():
        statistic = "update_ratio" if name == "update_spread" else name
        known = [row for row in rows if row["step"] == last and statistic in row]
        if statistic == "update_ratio":
            known = [row for row in known if _is_weight(row)]
        if not known:
            return f"{statistic} was not measured: name it in statistics="
        if name == "update_spread":
            if _spread(known) > limit:
                return f"{_spread_words(known)} at step {last:,}, above {limit:.3g}"
            continue
        wrong = next((row for row in known if row[statistic] > limit), None)
        if wrong is not None:
            return f"{statistic} is {wrong[statistic]:.3g} at {wrong['name']} at step {last:,}, above {limit:.3g}"
    return None


def _not_finite(rows: Sequence[_Row]) -> Verdict | None:
    for row in rows:
        numbers = [row[name] for name in ("squared_mean", "variance", "update_ratio", "gradient_rms") if name in row]
        if not all(map(math.isfinite, numbers)):
            return Verdict(
                f"the signal is not finite at {row['name']} at step {row['step']:,}",
                f"{_CLIP}; under float16 take bfloat16, or a loss scale",
                _PAGE,
            )
    return None


def _exploded(rows: Sequence[_Row]) -> Verdict | None:
    found = _first_lasting(rows, "join", "variance", lambda value: value > EXPLODED)
    if found is None:
        return None
    row, since = found
    return Verdict(
        f"variance passes {EXPLODED:.0f} at {row['name']} {since} ({row['variance']:.3g} at step {row['step']:,})",
        f"{_CLIP}; `normfree.convert(model, images)` bounds the signal where the network does not",
        _PAGE,
    )


def _vanished(rows: Sequence[_Row]) -> Verdict | None:
    found = _first_lasting(rows, "join", "variance", lambda value: value < VANISHED)
    if found is None:
        return None
    row, since = found
    return Verdict(
        f"variance falls below {VANISHED} at {row['name']} {since} ({row['variance']:.3g} at step {row['step']:,})",
        "less weight decay on gains and on what is in front of it, or `normfree.convert(model, images)`, whose weights "
        "have a size of their own",
        _PAGE,
    )


def _died(rows: Sequence[_Row]) -> Verdict | None:
    found = _first_lasting(rows, "rectifier", "dead", lambda value: value >= DEAD)
    if found is None:
        return None
    row, since = found
    steps = sorted({r["step"] for r in rows if "dead" in r})
    verb = "are dead" if since.endswith(f"step {steps[0]:,} on") else "died"
    dying = len({r["name"] for r in rows if r["step"] == row["step"] and r.get("dead", 0) >= DEAD})
    others = f", the first of {dying} rectifiers" if dying > 1 else ""
    return Verdict(
        f"channels of {row['name']} {verb} {since}{others}: {row['dead']:.0%} are zero for the whole batch at step "
        f"{row['step']:,}",
        f"{_CLIP}; smooth activations (SiLU, GELU) have no dead side",
        _PAGE,
    )


def _closed(rows: Sequence[_Row]) -> Verdict | None:
    steps = {row["step"] for row in rows if "branch_to_stream" in row}
    if len(steps) < 2:
        return None  # branches may begin closed
    found = _first_lasting(rows, "join", "branch_to_stream", lambda value: value < VANISHED)
    if found is None:
        return None
    row, since = found
    return Verdict(
        f"the branch of {row['name']} adds less than a hundredth of its stream {since}",
        "open it: `skip_gain=None` in our networks, a larger start of SkipInit or LayerScale in others, and no weight "
        "decay on them",
        _PAGE,
    )


def _moves_far(rows: Sequence[_Row]) -> Verdict | None:
    weights = [row for row in rows if _is_weight(row)]
    found = _first_lasting(weights, "parameter", "update_ratio", lambda value: value > LARGE_UPDATE)
    if found is None:
        return None
    row, since = found
    return Verdict(
        f"a step moves {row['name']} by more than a tenth of its size {since} ({row['update_ratio']:.0%} at step "
        f"{row['step']:,})",
        _CLIP,
        _PAGE,
    )


def _moves_apart(rows: Sequence[_Row]) -> Verdict | None:
    weights = defaultdict(list)
    for row in rows:
        if _is_weight(row) and "update_ratio" in row:
            weights[row["step"]].append(row)
    since = None
    for step in sorted(weights, reverse=True):
        if _spread(weights[step]) < UPDATE_SPREAD:
            break
        since = step
    if since is None:
        return None
    return Verdict(
        f"{_spread_words(weights[max(weights)])}, relative to their sizes, from step {since:,} on",
        "give them learning rates of their own (parameter groups), or take an optimizer whose steps go by the weights' "
        "sizes, such as LAMB",
        _PAGE,
    )


def _is_weight(row: _Row) -> bool:
    return row["kind"] == "parameter" and "x" in row["shape"]


def _spread(weights: Sequence[_Row]) -> float:
    ratios = [row["update_ratio"] for row in weights if row["update_ratio"] > 0]
    return max(ratios) / min(ratios) if ratios else 1.0


def _spread_words(weights: Sequence[_Row]) -> str:
    moving = [row for row in weights if row["update_ratio"] > 0]
    most, least = (pick(moving, key=lambda row: row["update_ratio"]) for pick in (max, min))
    return f"{most['name']} moves {_spread(weights):.0f} times as much as {least['name']}"


def _first_lasting(
    rows: Sequence[_Row], kind: str, statistic: str, wrong: Callable[[float], bool]
) -> tuple[_Row, str] | None:
    """Find the place where something has been wrong the longest, up to its last measured step; the first such place.

    Returns its last row, and "from step … on".
    """
    by_place = defaultdict(list)
    for row in rows:
        if row["kind"] == kind and statistic in row:
            by_place[row["name"]].append(row)
    found: list[tuple[int, _Row]] = []
    for place in by_place.values():
        since = None
        for row in reversed(place):
            if not wrong(row[statistic]):
                break
            since = row["step"]
        if since is not None:
            found.append((since, place[-1]))
    if not found:
        return None
    since, row = min(found, key=lambda item: (item[0], item[1]["depth"]))
    return row, f"from step {since:,} on"
