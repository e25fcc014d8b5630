"""Verdicts on a training, in words: what goes wrong with its signal, where, and from which step on."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
    found = [*(_lasting_verdict(rows, wrong) for wrong in _LASTING), _moves_apart(rows)]
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


class _Lasting(NamedTuple):
    """Something that goes wrong at a place and stays wrong, and the words for it."""

    kinds: tuple[str, ...]
    statistic: str
    is_wrong: Callable[[float], bool]
    words: str  # of name, since, step, value, and others: the places where it lasts, too
    remedy: str
    least_steps: int = 1


_SIGNAL = ("join", "weight layer")
_LASTING = (
    _Lasting(
        _SIGNAL, "variance", lambda value: value > EXPLODED,
        f"variance passes {EXPLODED:.0f} at {{name}} {{since}} ({{value:.3g}} at step {{step:,}})",
        f"{_CLIP}; `normfree.convert(model, images)` bounds the signal where the network does not",
    ),
    _Lasting(
        _SIGNAL, "variance", lambda value: value < VANISHED,
        f"variance falls below {VANISHED} at {{name}} {{since}} ({{value:.3g}} at step {{step:,}})",
        "less weight decay on gains and on what is in front of it, or `normfree.convert(model, images)`, whose weights "
        "have a size of their own",
    ),
    _Lasting(
        ("rectifier",), "dead", lambda value: value >= DEAD,
        "channels of {name} died {since}{others}: {value:.0%} are zero for the whole batch at step {step:,}",
        f"{_CLIP}; smooth activations (SiLU, GELU) have no dead side",
    ),
    _Lasting(
        ("join",), "branch_to_stream", lambda value: value < VANISHED,
        "the branch of {name} adds less than a hundredth of its stream {since}",
        "open it: `skip_gain=None` in our networks, a larger start of SkipInit or LayerScale in others, and no weight "
        "decay on them",
        least_steps=2,  # branches may begin closed
    ),
    _Lasting(
        ("weight",), "update_ratio", lambda value: value > LARGE_UPDATE,
        "a step moves {name} by more than a tenth of its size {since} ({value:.0%} at step {step:,})",
        _CLIP,
    ),
)  # fmt: skip


def _lasting_verdict(rows: Sequence[_Row], wrong: _Lasting) -> Verdict | None:
    """Return the verdict on the place where it has been wrong the longest; of several the first in the network."""
    by_place = defaultdict(list)
    for row in rows:
        if wrong.statistic in row and ("weight" if _is_weight(row) else row["kind"]) in wrong.kinds:
            by_place[row["name"]].append(row)
    found: list[tuple[int, int, _Row]] = []
    for place in by_place.values():
        lasting = list(itertools.takewhile(lambda row: wrong.is_wrong(row[wrong.statistic]), reversed(place)))
        if lasting:
            found.append((lasting[-1]["step"], place[-1]["depth"], place[-1]))
    if not found or len({row["step"] for place in by_place.values() for row in place}) < wrong.least_steps:
        return None
    since, _, row = min(found, key=lambda item: item[:2])
    words = wrong.words.format(
        name=row["name"],
        since=f"from step {since:,} on",
        step=row["step"],
        value=row[wrong.statistic],
        others=f", the first of {len(found)} rectifiers" if len(found) > 1 else "",
    )
    return Verdict(words, wrong.remedy, _PAGE)


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
