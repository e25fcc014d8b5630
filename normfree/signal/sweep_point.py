"""A point of a sweep: one network, measured at initialisation and after some steps of its optimizer."""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.errors import SignalError
from normfree.signal.reader import numbered_names
from normfree.trace.inputs import as_call, noise
from normfree.trace.joins import find_joins
from normfree.trace.preparation import isolated_rng
from normfree.trace.tape import Tape
from normfree.trace.watched import exclusively, refuse_unrunnable, run_watched

QUANTITIES = {
    "rms": "Signal at initialisation",
    "variance": "Average channel variance",
    "rms_after": "Signal after the steps",
    "change": "Change",
}
"""What is measured at each place, and its titles in figures: root mean squares of the signal and of its change."""


@dataclass(frozen=True)
class Experiment:
    """Functions that a sweep calls at each point."""

    factory: Callable[..., nn.Module]
    data: Callable[..., tuple[Any, Any]]
    optimizer: Callable[..., Any]
    loss: Callable[[Any, Any], Tensor]
    steps: int


@dataclass(frozen=True)
class Place:
    """Numbers of one weight layer or join of one network."""

    kind: str  # weight layer or join
    position: int  # among those of its kind
    name: str
    numbers: Mapping[str, float]  # by the names of QUANTITIES


@dataclass
class _Run:
    """One watched run, and the values at what it reduced."""

    tape: Tape = field(default_factory=Tape)
    values: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, index: int, tensor: Tensor) -> None:
        """Keep a copy of the value of a node."""
        self.values[index] = tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)


def noise_and_labels(model: nn.Module, batch: int = 16) -> tuple[Any, Any]:
    """Draw white noise of the model's input size; labels are drawn for its outputs, see `class_loss`."""
    return noise(model, batch), None


def adam(model: nn.Module, lr: float = 1e-3) -> Any:
    """Make the optimizer of a sweep that is given none."""
    return torch.optim.Adam(model.parameters(), lr)


def class_loss(output: Any, labels: Tensor | None) -> Tensor:
    """Compute the cross-entropy of an output (N, K), to labels of zero to K - 1 in turn where there are none.

    Raises SignalError for another output.
    """
    if not isinstance(output, Tensor) or output.ndim != 2 or not output.is_floating_point():
        shown = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise SignalError(f"the output is {shown}, not logits (N, K): give a loss of your own")
    if labels is None:
        labels = torch.arange(len(output), device=output.device) % output.shape[1]
    return F.cross_entropy(output, labels.to(output.device))


def arguments_of(experiment: Experiment, names: list[str]) -> dict[str, list[str]]:
    """Find which of the functions takes which of the arguments: by name, else the factory where it takes any.

    Raises ValueError for an argument that nothing takes.
    """
    functions = {"factory": experiment.factory, "data": experiment.data, "optimizer": experiment.optimizer}
    taken: dict[str, list[str]] = {part: [] for part in functions}
    parameters = {part: inspect.signature(function).parameters for part, function in functions.items()}
    for name in names:
        takers = [part for part in functions if name in parameters[part]]
        if not takers and any(p.kind is p.VAR_KEYWORD for p in parameters["factory"].values()):
            takers = ["factory"]
        if not takers:
            raise ValueError(f"neither the factory nor the data nor the optimizer takes an argument called {name!r}")
        for part in takers:
            taken[part].append(name)
    return taken


@exclusively
def measure_point(experiment: Experiment, point: Mapping[str, Any], seed: int) -> list[Place]:
    """Make a network, measure it, train it for some steps on one batch, and measure it again on that."""
    taken = arguments_of(experiment, list(point))
    given = {part: {name: point[name] for name in names} for part, names in taken.items()}
    with isolated_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        model = experiment.factory(**given["factory"])
        if not isinstance(model, nn.Module):
            raise TypeError(f"the factory returned a {type(model).__name__}; it must return a torch.nn.Module")
        refuse_unrunnable(model)
        batch = experiment.data(model, **given["data"])
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise TypeError("data must return two things: the inputs of the model, and what the loss compares with")
        inputs, targets = batch
        args, kwargs = as_call(inputs, model)
        before = _measured(model, args, kwargs)
        after = before
        if experiment.steps:
            optimizer = experiment.optimizer(model, **given["optimizer"])
            model.train()
            for _ in range(experiment.steps):
                optimizer.zero_grad()
                experiment.loss(model(*args, **kwargs), targets).backward()
                optimizer.step()
            after = _measured(model, args, kwargs)
    return _places(model, before, after)


def _measured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Run:
    run = _Run()
    run_watched(model, run.tape, args, kwargs, reduce_weight_layers=True, on_value=run.keep)
    return run


def _places(model: nn.Module, before: _Run, after: _Run) -> list[Place]:
    """Return the joins and weight layers, each kind in the order in which it runs."""
    joins = {join.node for join in find_joins(before.tape)}
    nodes = before.tape.nodes
    if [node.op for node in nodes] != [node.op for node in after.tape.nodes]:
        raise SignalError(f"{type(model).__name__} does other things after the steps than before: nothing to compare")
    layers = [index for index in before.values if nodes[index].weight_layer and index not in joins]
    if not layers and not joins:
        raise SignalError(f"{type(model).__name__} passed its inputs through no weight layer: nothing to measure")
    found = []
    for kind, indices in (("join", sorted(joins)), ("weight layer", layers)):
        names = numbered_names([nodes[index].module or type(model).__name__ for index in indices])
        for position, (index, name) in enumerate(zip(indices, names, strict=True)):
            old, new = before.values[index], after.values[index]
            statistics = nodes[index].statistics
            assert statistics is not None
            numbers = {
                "rms": _rms(old),
                "variance": float(statistics[1]),
                "rms_after": _rms(new),
                "change": _rms(new - old),
            }
            found.append(Place(kind, position, name, numbers))
    return found


def _rms(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel())


def points_of(over: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of the values, the last argument's changing fastest."""
    return [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]


def has_logarithm(value: Any) -> bool:
    """Tell whether a value of an argument has a logarithm."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
