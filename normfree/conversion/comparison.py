"""The comparison: a converted network beside the original, output by output, on the same images."""

import math
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfree.conversion.plan import Plan
from normfree.errors import SignalError
from normfree.trace.inputs import map_tensors
from normfree.trace.preparation import isolated_rng
from normfree.trace.progress import telling
from normfree.trace.tape import Tape
from normfree.trace.watched import run_watched

# Differences, over the largest value, that rounding makes in the deepest networks.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF = 0.05
# Values below have few bits, or become 0, as where the signal of a new network vanishes.
_FLOORS = {dtype: torch.finfo(dtype).tiny / torch.finfo(dtype).eps for dtype in _ROUNDING}
_SAMPLE = 4096
_OUTPUT = "output"
_EQUAL = (0.0, 0.0)
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Observation:
    """Outputs of a run in eval mode, and samples of what modules gave on the way."""

    outputs: list[Tensor | None]  # None where its values, or their number, depend on a selection
    modules: dict[str, list[Tensor]]  # by path, of each call, in the order of the run


def observe(model: nn.Module, call: Call, plan: Plan, *, rounded: bool = False) -> Observation:
    """Run a model in eval mode and note its outputs, and those of the normalizers that go and of the weights that stay.

    What depends on a selection (the boxes that a suppression leaves, the k best) is left out. With `rounded` the inputs
    differ by some units in their last place. Random numbers are the same in each run.
    """
    replaced = {planned.path for planned in plan.layers}
    watched = {norm.path for norm in plan.removed}
    watched |= {path for path, module in model.named_modules() if module._parameters} - replaced
    tape, seen = Tape(), []

    def note(path: str, node: int | None, output: Tensor) -> None:
        if path in watched and node is not None:
            values = output.detach().flatten()
            seen.append((path, node, values[:: max(1, values.numel() // _SAMPLE)].clone()))

    with isolated_rng(), telling("comparing outputs"):
        torch.manual_seed(0)
        arguments = map_tensors(_rounded, call) if rounded else call
        outputs = run_watched(model, tape, *arguments, batch_stats=False, on_module=note)
    selected: list[bool] = []
    for step in tape.nodes:
        selected.append(step.selects or any(selected[parent] for parent in step.parents))
    modules: dict[str, list[Tensor]] = defaultdict(list)
    for path, node, values in seen:
        if not selected[node]:
            modules[path].append(values)
    ends = zip(outputs, tape.outputs, strict=True)
    return Observation([None if node is not None and selected[node] else out for out, node in ends], modules)


def refuse_difference(original: Observation, converted: nn.Module, call: Call, plan: Plan) -> float:
    """Return the largest difference of an output from the original's, over its largest value.

    Warns where the network differs from itself by more than rounding when it is run twice.

    Raises SignalError where the difference is beyond rounding, and names the first module that gives something else.
    """
    found = observe(converted, call, plan)
    differences = _differences(original, found)
    outputs = [difference for place, (difference, _) in differences.items() if place.startswith(_OUTPUT)]
    largest = max(outputs, default=0.0)
    beyond = _beyond_rounding(differences)
    if not beyond:
        return largest
    repeated = _differences(found, observe(converted, call, plan))
    unsteady = {place: one for place, one in beyond.items() if one <= 3 * repeated.get(place, _EQUAL)[0]}
    if unsteady:
        warnings.warn(
            f"{next(iter(unsteady))} of a {type(converted).__name__} differs from itself when it is run twice: the "
            "conversion can be compared within that only",
            stacklevel=3,
        )
    beyond = {place: one for place, one in beyond.items() if place not in unsteady}
    rounded = _differences(found, observe(converted, call, plan, rounded=True)) if beyond else {}
    for place, difference in beyond.items():
        if difference == math.inf or difference > 10 * rounded.get(place, _EQUAL)[0]:
            raise SignalError(
                f"the conversion would change the function: {place} differs by {difference:.1e} of its largest value. "
                "Exclude the normalizers before it, or take keep='weights'"
            )
    return largest


def _differences(one: Observation, other: Observation) -> dict[str, tuple[float, float]]:
    """Return by place, in the order of the run, the largest relative difference, and what rounding may make it."""
    found = {}
    for path, values in one.modules.items():
        there = other.modules.get(path, [])
        pairs = zip(values, there, strict=False)
        difference = max((_difference(a, b) for a, b in pairs), default=0.0) if len(there) == len(values) else math.inf
        found[f"the output of {path}"] = difference, _limit(values[0])
    if len(one.outputs) != len(other.outputs):
        found[_OUTPUT] = math.inf, 0.0
        return found
    for index, (a, b) in enumerate(zip(one.outputs, other.outputs, strict=True)):
        if a is not None and b is not None:
            found[f"{_OUTPUT} {index}"] = _difference(a, b), _limit(a)
    return found


def _beyond_rounding(differences: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {place: difference for place, (difference, limit) in differences.items() if difference > limit}


def _difference(a: Tensor, b: Tensor) -> float:
    """Compute the largest difference over the largest finite value of both; infinite for other shapes, or other NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    floor = _FLOORS.get(a.dtype, 0.0)
    a, b = a.detach().double(), b.detach().double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return math.inf
    a, b = a[finite], b[finite]
    size = max(floor, float(torch.stack([a, b]).abs().max())) if a.numel() else 0.0
    return float((a - b).abs().max()) / size if size else 0.0


def _limit(values: Tensor) -> float:
    return _ROUNDING.get(values.dtype, _HALF)


def _rounded(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + 8 * torch.finfo(tensor.dtype).eps * torch.randn_like(tensor))
