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
from normfree.trace.tape import Tape
from normfree.trace.watched import run_watched

# Differences, over the largest value, that rounding makes in the deepest networks.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF = 0.05
_SAMPLE = 4096
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

    with isolated_rng():
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
    largest, place = _largest(original, found)
    if not place:
        return largest
    repeated, differs = _largest(found, observe(converted, call, plan))
    if differs and largest <= 3 * repeated:
        warnings.warn(
            f"a {type(converted).__name__} differs from itself by {repeated:.1e} of the largest value when it is run "
            "twice: its conversion can be compared within that only",
            stacklevel=3,
        )
        return largest
    if largest <= 10 * _largest(found, observe(converted, call, plan, rounded=True))[0]:
        return largest
    raise SignalError(
        f"the conversion would change the function: {place} differs by {largest:.1e} of its largest value. Exclude the "
        "normalizers before it, or take keep='weights'"
    )


def _largest(one: Observation, other: Observation) -> tuple[float, str]:
    """Return the largest relative difference of two runs, and the first place where it is beyond rounding, or ""."""
    largest, place = 0.0, ""
    for path, values in one.modules.items():
        there = other.modules.get(path, [])
        pairs = list(zip(values, there, strict=False))
        difference = max((_difference(a, b) for a, b in pairs), default=0.0)
        if len(there) != len(values):
            difference = math.inf
        if difference > _limit(values[0]) and not place:
            place, largest = f"the output of {path}", max(largest, difference)
    if len(one.outputs) != len(other.outputs):
        return math.inf, place or "the number of outputs"
    for index, (a, b) in enumerate(zip(one.outputs, other.outputs, strict=True)):
        if a is not None and b is not None:
            difference = _difference(a, b)
            largest = max(largest, difference)
            if difference > _limit(a) and not place:
                place = "the output" if len(one.outputs) == 1 else f"output {index}"
    return largest, place


def _difference(a: Tensor, b: Tensor) -> float:
    """Compute the largest difference over the largest finite value of both; infinite for other shapes, or other NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = a.detach().double(), b.detach().double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return math.inf
    a, b = a[finite], b[finite]
    size = float(torch.stack([a, b]).abs().max()) if a.numel() else 0.0
    return float((a - b).abs().max()) / size if size else 0.0


def _limit(values: Tensor) -> float:
    return _ROUNDING.get(values.dtype, _HALF)


def _rounded(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + 8 * torch.finfo(tensor.dtype).eps * torch.randn_like(tensor))
