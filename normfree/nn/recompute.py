"""Tensors that autograd computes again in the backward pass instead of keeping them."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normfree import _torch
from normfree.nn.symbolic import is_symbolic

# Activations whose derivative needs their input, which is therefore kept anyway.
_KEEP_INPUT = {"CELU", "ELU", "GELU", "Hardswish", "LeakyReLU", "Mish", "SELU", "SiLU", "Softplus", "Softsign", "Swish"}


@contextlib.contextmanager
def recomputing(result: Tensor, function: Callable[..., Tensor], *sources: Tensor | None) -> Iterator[None]:
    """Save function(*sources), which equals `result`, where an operation inside would save `result` for its backward.

    For a cheap `function` of sources that are kept anyway. Sources may themselves be results of an enclosing
    `recomputing`. Where somebody else decides what is saved (activation checkpointing, hooks of the user, compilers,
    torch.func) nothing is changed.
    """
    if not _possible(result):
        yield
        return
    entry = (result, _Recomputation(function, [_recomputations.of.get(id(s), (None, s))[1] for s in sources]))
    _recomputations.of[id(result)] = entry
    hooked = _torch.saved_tensors_hooks()[1] is not None  # by an enclosing `recomputing`
    try:
        with contextlib.nullcontext() if hooked else torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        del _recomputations.of[id(result)]


def recomputing_activation(result: Tensor, activation: nn.Module, source: Tensor) -> Any:
    """Apply `recomputing` to activation(source), or do nothing where that would keep more than it saves."""
    in_place = getattr(activation, "inplace", False)
    # Autocast, which is off in the backward pass, gives some another dtype.
    kept = type(activation).__name__ in _KEEP_INPUT and not in_place
    if kept and not is_symbolic(result) and result.dtype == source.dtype:
        return recomputing(result, activation.forward, source)
    return contextlib.nullcontext()


class _Recomputations(threading.local):
    def __init__(self) -> None:
        self.of: dict[int, tuple[Tensor, _Recomputation]] = {}


class _Recomputation:
    def __init__(self, function: Callable[..., Tensor], sources: list["Tensor | _Recomputation | None"]) -> None:
        self.function = function
        self.sources = [s.detach() if isinstance(s, Tensor) else s for s in sources]
        self.versions = [s._version if isinstance(s, Tensor) else 0 for s in sources]

    def __call__(self) -> Tensor:
        for source, version in zip(self.sources, self.versions, strict=True):
            if isinstance(source, Tensor) and source._version != version:
                raise RuntimeError(
                    "a tensor needed for the backward pass has been modified by an in-place operation: "
                    f"shape {tuple(source.shape)}, version {source._version}, expected {version}"
                )
        with torch.no_grad():
            return self.function(*(s() if isinstance(s, _Recomputation) else s for s in self.sources))


_recomputations = _Recomputations()


def _pack(tensor: Tensor) -> Any:
    result, recipe = _recomputations.of.get(id(tensor), (None, None))
    return recipe if result is tensor else tensor


def _unpack(packed: Any) -> Tensor:
    return packed() if isinstance(packed, _Recomputation) else packed


def _possible(result: Tensor) -> bool:
    if torch.compiler.is_compiling() or not result.requires_grad or _torch.functorch_is_active():
        return False
    return nobody_else_saves()


def nobody_else_saves() -> bool:
    """Tell whether no hook but those of `recomputing` sees what is saved, as activation checkpointing's does."""
    allowed, hooks = _torch.saved_tensors_hooks()
    return allowed and hooks in (None, (_pack, _unpack))
