"""Where a signal that is not finite began."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree.training.sharding import finite, is_sharded


class Place(NamedTuple):
    """Where it began: in words, and how little that says (0: a certain place)."""

    vague: int
    words: str


def locate(model: nn.Module, loss: Callable[[], Tensor]) -> Place:
    """What is first not finite, in words: a parameter, the output of a layer, the gradient at one, or of a parameter.

    `loss` runs the model again; parameters and their gradients are not changed.
    """
    for name, parameter in model.named_parameters():
        if not finite(parameter):
            return Place(0, f"the parameter {name}")
    sharded = is_sharded(model)
    gradients: dict[str, Tensor] = {}
    forward: list[str] = []
    backward: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            if not bool(torch.isfinite(output).all()):
                forward.append(name)
            if output.requires_grad:
                output.register_hook(lambda g: None if bool(torch.isfinite(g).all()) else backward.append(name))

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if not list(m.children())]
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            value = loss()
            if not sharded and not forward and bool(torch.isfinite(value)):
                named = {n: p for n, p in model.named_parameters() if p.requires_grad}
                found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
                gradients = {n: g for n, g in zip(named, found, strict=True) if g is not None}
    finally:
        for handle in handles:
            handle.remove()
    if forward:
        return Place(0, f"the output of {forward[0]} ({type(model.get_submodule(forward[0])).__name__})")
    if not bool(torch.isfinite(value)):
        return Place(1, "the loss, of outputs that are finite")
    if backward:
        kind = type(model.get_submodule(backward[0])).__name__
        return Place(0, f"the gradient at the output of {backward[0]} ({kind})")
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            return Place(0, f"the gradient of {name}")
    if sharded:  # a backward pass on some of the processes would wait for the others for ever
        return Place(3, "a gradient; of what, sharded parameters do not tell")
    largest = max(gradients, key=lambda name: float(gradients[name].abs().max()))
    return Place(2, f"the norm of the gradients, each finite by itself; the largest is that of {largest}")
