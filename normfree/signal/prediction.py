"""A prediction: channel squared mean and variance at every join, from weights and structure alone."""

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfree.errors import SignalError
from normfree.signal.moment_rules import rule_of
from normfree.signal.moments import Moments, normal
from normfree.trace.channels import channel_moments, default_channel_axis, has_statistics
from normfree.trace.inputs import map_tensors, tensors
from normfree.trace.joins import find_joins
from normfree.trace.tape import Node, Operation, Tape
from normfree.trace.watched import run_watched

_EXAMPLES = 2  # of the run whose operations are followed


@dataclass(frozen=True)
class Prediction:
    """Expected signal of a network.

    Attributes:
        values: Squared mean and variance of each record, in the order in which the network runs; None where an
            operation before it has no rule.
        assumptions: Sentences, one for each thing that is taken to be so.
        unpredicted: Operations that have no rule, and the modules in which they stand.
    """

    values: tuple[tuple[float, float] | None, ...]
    assumptions: tuple[str, ...]
    unpredicted: tuple[str, ...]


def predict(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, batch_stats: bool, weight_layers: bool
) -> Prediction:
    """Push the moments of white noise, of the inputs' channel means and variances, through the network's operations.

    The network runs on two of the examples, so that its operations are known; their values are not used. The moments
    are exact for convolutions and linear layers of white inputs, borders included, and for pointwise functions of
    normal variables (the recursion of Brock et al. 2021, section 4.1, and of Hanin and Rolnick 2018, arXiv 1803.01719,
    for any graph).

    Raises SignalError when the forward fails.
    """
    try:
        return _predict(model, args, kwargs, _EXAMPLES, batch_stats, weight_layers)
    except SignalError:  # a network that wants the batch as it is
        return _predict(model, args, kwargs, None, batch_stats, weight_layers)


def _predict(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], examples: int | None, batch_stats: bool,
    weight_layers: bool,
) -> Prediction:  # fmt: skip
    count = next((len(t) for t in tensors((args, kwargs)) if t.ndim), 0)
    followed: dict[int, Tensor] = {}

    def few(tensor: Tensor) -> Tensor:
        return tensor[:examples] if tensor.ndim and len(tensor) == count else tensor

    whole = list({id(t): t for t in tensors((args, kwargs))}.values())
    args, kwargs = map_tensors(lambda t: followed.setdefault(id(t), few(t)), (args, kwargs))
    starts = [_of_input(t, few(t).shape) for t in whole]
    tape = Tape()
    follower = _Follower(starts, count)
    run_watched(
        model, tape, args, kwargs, batch_stats=batch_stats, reduce_weight_layers=weight_layers,
        on_operation=follower.follow,
    )  # fmt: skip
    if weight_layers:
        nodes = [node for node in tape.nodes if node.weight_layer and node.statistics is not None]
    else:
        nodes = [tape.nodes[join.node] for join in find_joins(tape)]
    if not any(starts):
        follower.unpredicted["inputs that are not real numbers"] = None
    values = [follower.statistics.get(node.index) for node in nodes]
    return Prediction(tuple(values), tuple(follower.assumptions), tuple(follower.unpredicted))


def _of_input(x: Tensor, shape: Sequence[int]) -> Moments | None:
    """Return white noise of the channels' means and variances, or of the tensor's where a channel has few values."""
    if not has_statistics(x):
        return None
    axis = default_channel_axis(x.ndim)
    if x.ndim == 1 or x.numel() // x.shape[axis] < 64:
        mean, variance = x.to(_precision(x)).mean(), x.to(_precision(x)).var(correction=0)
        return normal(mean.expand(shape).clone(), variance.expand(shape).clone())
    mean, variance = (
        m.to(_precision(x)).view([-1 if d == axis else 1 for d in range(x.ndim)]).expand(shape).clone()
        for m in channel_moments(x, axis)
    )
    return normal(mean, variance)


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _statistics(m: Moments, node: Node, count: int) -> tuple[float, float]:
    """Return what a batch of `count` examples is expected to show of the channels: squared mean and variance."""
    axis = default_channel_axis(m.mean.ndim) if node.channel_axis is None else node.channel_axis
    mean = m.mean.double().movedim(axis, 0).flatten(1)
    variance = m.variance.double().movedim(axis, 0).flatten(1).mean(1)
    seen = mean.shape[1] // max(len(m.mean), 1) * count
    of_means = mean.var(1, correction=0) if mean.shape[1] > 1 else torch.zeros_like(variance)
    squared_mean = mean.mean(1).square() + variance / seen
    return float(squared_mean.mean()), float((of_means + variance * (1 - 1 / seen)).mean())


class _Follower:
    """Follows a run: keeps the moments of tensors that are there, and the statistics of what was reduced."""

    def __init__(self, starts: Sequence[Moments | None], count: int) -> None:
        self.moments: dict[int, Moments] = {index: m for index, m in enumerate(starts) if m is not None}
        self.count = count
        self.statistics: dict[int, tuple[float, float]] = {}
        self.assumptions: dict[str, None] = {}
        self.unpredicted: dict[str, None] = {}

    def follow(self, operation: Operation) -> None:
        """Push the moments of an operation's inputs to its outputs."""
        if not all(index in self.moments for index in operation.inputs.values()):
            return  # of what is not known already, nothing more is
        rule = rule_of(operation.op)
        results: list[Any] = []
        if rule is not None and operation.outputs:
            # What a rule was not written for stops the prediction, never the run that it follows.
            with contextlib.suppress(Exception):
                made = rule[0](operation.func, self._arguments(operation))
                results = made if isinstance(made, list) else [made]
        for (tensor, node), m in zip(operation.outputs, results, strict=False):
            if tuple(m.shape) != node.shape:
                continue
            self.moments[node.index] = m
            weakref.finalize(tensor, self.moments.pop, node.index, None)
            if node.statistics is not None:
                self.statistics[node.index] = _statistics(m, node, self.count)
        if operation.outputs and operation.outputs[0][1].index not in self.moments:
            self.unpredicted.setdefault(f"{operation.op} in {operation.outputs[0][1].module or 'the network'}")
        elif rule is not None:
            self.assumptions.update(dict.fromkeys(rule[1]))

    def _arguments(self, operation: Operation) -> dict[str, Any]:
        """Return the arguments by name, moments in the place of activations."""

        def moments_of(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) in operation.inputs:
                    m = self.moments[operation.inputs[id(value)]]
                    if m.shape != value.shape:
                        raise NotImplementedError  # a part of it was written through a view
                    return m
                return value.to(_precision(value)) if value.is_floating_point() else value
            return [moments_of(item) for item in value] if isinstance(value, list | tuple) else value

        names = [argument.name for argument in operation.func._schema.arguments]
        values = dict(zip(names, operation.args, strict=False)) | operation.kwargs
        return {name: moments_of(value) for name, value in values.items()}
