"""Scales by measurement: every converted layer's output, and every branch where it joins, at unit variance."""

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normfree.conversion.structure import branch_ends
from normfree.errors import SignalError
from normfree.nn.scaled_layer import ScaledWS
from normfree.trace.channels import channel_moments
from normfree.trace.progress import telling
from normfree.trace.tape import Tape

# Gates need few passes; a layer that runs several times may need one for each of those before it that do, too.
_PASSES = 4
_PASSES_OF_SHARED = 16
CLOSE = 0.02


def calibrate(layers: Mapping[str, ScaledWS], shifts: Mapping[str, Tensor], run: Callable[[Tape], Any]) -> float:
    """Set `in_scale` of the layers, and the biases of some, in the order in which they run. Branches should be open.

    A layer's output gets the variance that a normalizer with its gains would give it, that is the mean square of the
    gains, times `out_scale`²; one that ends residual branches such that they have it where they join; one that runs
    several times on average over its calls. Channels of the layers in `shifts` get the means that these say. `run` runs
    the model, recorded on a tape. Gates are not linear in what they are given, and what runs several times depends on
    what is known after its last call, so this is repeated until all is within 2 %, or for some passes. The largest
    relative departure of a variance is returned.

    Raises SignalError for an output that is constant or not finite.
    """
    target = dict.fromkeys(layers, 1.0)  # of a layer's output, over what its gains and `out_scale` make of 1
    before: Mapping[str, _Calls] = {}
    departure, passes = 0.0, 0
    while True:
        tape = Tape()
        with telling(f"setting scales, pass {passes + 1}"), _scaling(layers, shifts, target, before) as calls:
            run(tape)
        passes += 1
        wanted: dict[str, list[float]] = defaultdict(list)
        for operand, paths in branch_ends(tape).values():
            ends = [path for path in paths if path in layers]
            statistics = tape.nodes[operand].statistics
            if not ends or statistics is None:
                continue
            ratio = float(statistics[1]) / (sum(_square(layers[path]) for path in ends) / len(ends))
            if not 0 < ratio < math.inf:
                raise SignalError(f"the branch that ends with {ends[0]} has variance {statistics[1]:g} at its join")
            for path in ends:
                wanted[path].append(ratio)
        # Joins that share a layer can only be right on average.
        departures = [abs(sum(ratios) / len(ratios) - 1) for ratios in wanted.values()]
        departures += [one.departure(float(layers[path].in_scale)) for path, one in calls.items()]
        departure = max(departures, default=0.0)
        shared = any(len(one.variances) > 1 for one in calls.values())
        if departure <= CLOSE or passes == (_PASSES_OF_SHARED if shared else _PASSES):
            return departure
        for path, ratios in wanted.items():
            target[path] /= sum(ratios) / len(ratios)
        before = calls


@dataclass
class _Calls:
    """Calls of a layer in a pass: what they gave at `in_scale` 1, and the scale that each was given."""

    variances: list[float] = field(default_factory=list)  # over their target
    means: list[Tensor] = field(default_factory=list)  # of the channels, without bias
    scales: list[float] = field(default_factory=list)

    def departure(self, scale: float) -> float:
        """Return the largest relative difference of a call's variance from what the last scale makes of it."""
        return max(abs((one / scale) ** 2 - 1) for one in self.scales)

    def expected(self, before: "_Calls | None") -> tuple[float, Tensor]:
        """Return variance and means over all calls; those to come are as in the pass before, changed as these have."""
        seen = len(self.variances)
        variances, means = self.variances, torch.stack(self.means)
        if before is not None and len(before.variances) > seen:
            change = sum(variances) / sum(before.variances[:seen])
            variances = variances + [change * one for one in before.variances[seen:]]
            means = torch.cat([means, torch.stack(before.means[seen:]) * math.sqrt(change)])
        return sum(variances) / len(variances), means.mean(0)


def _square(layer: ScaledWS) -> float:
    """The variance that the layer makes of a standardized output."""
    return float(layer.out_scale) ** 2 * float(layer.gain.detach().double().square().mean())


@contextlib.contextmanager
def _scaling(
    layers: Mapping[str, ScaledWS], shifts: Mapping[str, Tensor], target: Mapping[str, float],
    before: Mapping[str, _Calls],
) -> Iterator[Mapping[str, _Calls]]:  # fmt: skip
    """Every layer that runs is rescaled to its target; one that runs several times to the mean over its calls."""
    calls: dict[str, _Calls] = defaultdict(_Calls)

    def rescale(path: str, layer: ScaledWS, _: Any, out: Tensor) -> Tensor:
        old = float(layer.in_scale)
        means, variances = channel_moments(out, layer.channel_axis % out.ndim)
        variance = float(variances.mean()) / _square(layer)
        if not 0 < variance < math.inf:
            what = "is constant" if variance == 0 else "is not finite"
            raise SignalError(f"the output of {path} {what} on these inputs: its variance cannot be set")
        shift = 0.0 if layer.bias is None else layer.bias.to(means) * layer.out_scale
        of = calls[path]
        of.variances.append(variance / old**2 / target[path])
        of.means.append((means - shift) / (old * layer.out_scale) if path in shifts else means.new_zeros(()))
        expected, mean = of.expected(before.get(path))
        new = 1 / math.sqrt(expected)
        of.scales.append(new)
        layer.in_scale.fill_(new)
        if layer.bias is not None and path in shifts:
            layer.bias.copy_(shifts[path].to(means) - mean * new)
        out.mul_(new / old)
        if layer.bias is None:
            return out
        shift = layer.bias.to(means) * layer.out_scale - shift * (new / old)
        return out.add_(shift.to(out.dtype).view(-1, *[1] * (out.ndim - 1 - layer.channel_axis % out.ndim)))

    handles = [layer.register_forward_hook(functools.partial(rescale, path)) for path, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
