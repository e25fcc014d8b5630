"""Scales by measurement: every converted layer's output, and every branch where it joins, at unit variance."""

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from normfree.conversion.structure import branch_ends
from normfree.errors import SignalError
from normfree.nn.scaled_layer import ScaledWS
from normfree.trace.channels import channel_statistics
from normfree.trace.tape import Tape

_PASSES = 4
CLOSE = 0.02


def calibrate(layers: Mapping[str, ScaledWS], shifts: Mapping[str, Tensor], run: Callable[[Tape], Any]) -> float:
    """Set `in_scale` of the layers, and the biases of some, in the order in which they run. Branches should be open.

    A layer's output gets the variance that a normalizer with its gains would give it, that is the mean square of the
    gains, times `out_scale`²; one that ends residual branches such that they have it where they join. Channels of the
    layers in `shifts` get the means that these say. `run` runs the model, recorded on a tape. Gates are not linear in
    what they are given, so this is repeated, up to four times, until branches are within 2 %. The largest relative
    departure of a branch's variance is returned.

    Raises SignalError for an output that is constant or not finite.
    """
    target = dict.fromkeys(layers, 1.0)  # of a layer's output, over what its gains and `out_scale` make of 1
    departure = 0.0
    for _ in range(_PASSES):
        tape = Tape()
        with _scaling(layers, shifts, target):
            run(tape)
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
        departure = max((abs(sum(ratios) / len(ratios) - 1) for ratios in wanted.values()), default=0.0)
        if departure <= CLOSE:
            break
        for path, ratios in wanted.items():
            target[path] /= sum(ratios) / len(ratios)
    return departure


def _square(layer: ScaledWS) -> float:
    """The variance that the layer makes of a standardized output."""
    return float(layer.out_scale) ** 2 * float(layer.gain.detach().double().square().mean())


@contextlib.contextmanager
def _scaling(
    layers: Mapping[str, ScaledWS], shifts: Mapping[str, Tensor], target: Mapping[str, float]
) -> Iterator[None]:
    """Every layer that runs is rescaled to its target; one that runs several times to the mean over its calls."""
    seen: dict[str, list[float]] = defaultdict(list)  # variance over target, at in_scale 1
    means: dict[str, list[Tensor]] = defaultdict(list)  # of the channels, at in_scale 1, without bias

    def rescale(path: str, layer: ScaledWS, _: Any, out: Tensor) -> Tensor:
        before = float(layer.in_scale)
        variance = float(channel_statistics(out, layer.channel_axis % out.ndim)[1]) / _square(layer)
        if not 0 < variance < math.inf:
            what = "is constant" if variance == 0 else "is not finite"
            raise SignalError(f"the output of {path} {what} on these inputs: its variance cannot be set")
        seen[path].append(variance / before**2 / target[path])
        after = 1 / math.sqrt(sum(seen[path]) / len(seen[path]))
        layer.in_scale.fill_(after)
        if layer.bias is None:
            return out.mul_(after / before)
        out.sub_(_broadcast(layer.bias, layer, out))
        if path in shifts:
            others = [axis for axis in range(out.ndim) if axis != layer.channel_axis % out.ndim]
            means[path].append(out.double().mean(others) / (before * layer.out_scale))
            mean = torch.stack(means[path]).mean(0) * after
            layer.bias.copy_(shifts[path].double() - mean)
        return out.mul_(after / before).add_(_broadcast(layer.bias, layer, out))

    handles = [layer.register_forward_hook(functools.partial(rescale, path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _broadcast(bias: Tensor, layer: ScaledWS, out: Tensor) -> Tensor:
    """Shape a bias, times `out_scale`, so that it broadcasts along the output's channels."""
    behind = out.ndim - 1 - layer.channel_axis % out.ndim
    return (bias * layer.out_scale.to(bias.dtype)).to(out.dtype).view(-1, *[1] * behind)
