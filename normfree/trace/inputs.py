"""Inputs of a model: as a call of its forward, or white noise of the size that it declares."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normfree import _torch


def as_call(inputs: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of the model's forward, on the model's device.

    A tuple is the positional arguments, a dict the keyword arguments, a DataLoader gives its first batch (of a pair,
    the first: images without labels), anything else, a list of images too, is the only argument.

    Raises TypeError where there is no tensor, ValueError for an empty one and for values that are not finite.
    """
    if isinstance(inputs, DataLoader):
        batch = next(iter(inputs), None)
        if batch is None:
            raise ValueError("the DataLoader is empty")
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs  # images that were not stacked
    if isinstance(inputs, tuple):
        args, kwargs = inputs, {}
    elif isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    else:
        args, kwargs = (inputs,), {}
    found = tensors((args, kwargs))
    if not found:
        raise TypeError(f"inputs hold no tensor: got {type(inputs).__name__}; give a tensor, tuple, dict or DataLoader")
    for tensor in found:
        if tensor.numel() == 0:
            raise ValueError(f"inputs hold an empty tensor of shape {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not bool(torch.isfinite(_values(tensor)).all()):
            raise ValueError(f"inputs of shape {tuple(tensor.shape)} hold NaN or infinite values")
    device = _device(model)
    return map_tensors(lambda t: t.to(device), args), map_tensors(lambda t: t.to(device), kwargs)


def noise(model: nn.Module, batch: int = 4, size: tuple[int, int] | None = None) -> Tensor:
    """Draw white noise x ~ N(0, 1) of shape (batch, *input_shape(model, size)), as the model's parameters are."""
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn(batch, *input_shape(model, size), device=reference.device, dtype=reference.dtype)


def input_shape(model: nn.Module, size: tuple[int, int] | None = None) -> tuple[int, ...]:
    """(C, H, W): what the model declares, or 224×224 with its first layer's channels; H and W are `size` if given.

    (features,) for a model that starts with a linear layer. Raises ValueError where there is neither.
    """
    shape = declared_input_size(model)
    if shape is None:
        first = first_layer(model, nn.modules.conv._ConvNd, nn.Linear)
        if isinstance(first, nn.Linear):
            shape = (first.in_features,)
        elif isinstance(first, nn.Conv2d):
            shape = (first.in_channels, 224, 224)
        else:
            raise ValueError(
                f"{type(model).__name__} does not say what its input looks like (no default_cfg, no 2-d convolution or "
                "linear layer first): give `inputs`"
            )
    if size is None:
        return shape
    if len(shape) != 3:
        raise ValueError(f"size is {size}, but the model's input has shape (N, {', '.join(map(str, shape))})")
    if min(size) < 1:
        raise ValueError(f"size is {size}; height and width must be at least 1")
    return (shape[0], *size)


def first_layer(model: nn.Module, *kinds: type[nn.Module]) -> nn.Module | None:
    """Return the module of one of these classes that the model registers first; None where it has none."""
    return next((module for module in model.modules() if isinstance(module, kinds)), None)


def declared_input_size(model: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W) where the model has a `default_cfg` or `pretrained_cfg` with an "input_size", as timm's have."""
    for attribute in ("default_cfg", "pretrained_cfg"):
        declared = getattr(model, attribute, None)
        size = declared.get("input_size") if isinstance(declared, Mapping) else getattr(declared, "input_size", None)
        if size:
            return tuple(size)
    return None


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The shapes of the inputs, such as "4×3×224×224"."""
    return ", ".join("×".join(map(str, t.shape)) for t in tensors((args, kwargs)))


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples, dicts and dataclasses."""
    found: list[Tensor] = []
    for leaf in _torch.leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting with `function` of every tensor."""
    return _torch.map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def _values(tensor: Tensor) -> Tensor:
    """Return the numbers that a tensor stores."""
    if tensor.layout == torch.strided:
        return tensor
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
