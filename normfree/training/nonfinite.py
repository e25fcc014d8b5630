"""The search for the first value that is not finite."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree.training.sharding import all_finite, is_sharded


class Origin(NamedTuple):
    """Origin of a value that is not finite."""

    uncertainty: int  # 0 for a certain place; the larger, the less the words say
    words: str


def locate_nonfinite(model: nn.Module, loss: Callable[[], Tensor]) -> Origin:
    """Find what is first not finite: a parameter, the output of a layer, the gradient at one, or of a parameter.

    `loss` runs the model again; parameters and their gradients are not changed.
    """
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            return Origin(0, f"the parameter {name}")
    found = _Found()
    sharded = is_sharded(model)
    with found.watching(model), torch.enable_grad(), torch.random.fork_rng():
        value = loss()
        if not sharded and not found.forward and bool(torch.isfinite(value)):
            named = {n: p for n, p in model.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            found.gradients = {n: g for n, g in zip(named, gradients, strict=True) if g is not None}
    return found.origin(model, value, sharded)


class _Found:
    """Layers, in the order in which they ran, whose output or gradient was not finite."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.gradients: dict[str, Tensor] = {}  # of parameters

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Look at the output of every layer, and at its gradient."""
        layers = [(name, module) for name, module in model.named_modules() if not list(module.children())]
        handles = [module.register_forward_hook(functools.partial(self._look, name)) for name, module in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if not bool(torch.isfinite(output).all()):
            self.forward.append(name)
        if output.requires_grad:
            output.register_hook(lambda g: None if bool(torch.isfinite(g).all()) else self.backward.append(name))

    def origin(self, model: nn.Module, loss: Tensor, sharded: bool) -> Origin:
        """Say what was first not finite."""
        if self.forward:
            return Origin(0, f"the output of {_named(model, self.forward[0])}")
        if not bool(torch.isfinite(loss)):
            return Origin(1, "the loss, of outputs that are finite")
        if self.backward:
            return Origin(0, f"the gradient at the output of {_named(model, self.backward[0])}")
        for name, gradient in self.gradients.items():
            if not bool(torch.isfinite(gradient).all()):
                return Origin(0, f"the gradient of {name}")
        if sharded:  # a backward pass on some of the processes would wait for the others for ever
            return Origin(3, "a gradient; of what, sharded parameters do not tell")
        largest = max(self.gradients, key=lambda name: float(self.gradients[name].abs().max()))
        return Origin(2, f"the norm of the gradients, each finite by itself; the largest is that of {largest}")


def _named(model: nn.Module, path: str) -> str:
    return f"{path} ({type(model.get_submodule(path)).__name__})"
