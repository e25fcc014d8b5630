"""Inputs of a model: as a call of its forward, or white noise of the size that it declares."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normfree import _torch

_IMAGES = ("image", "images", "img", "imgs", "pixel_values", "input", "inputs", "x", "data")  # by the names in use


def as_call(inputs: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of the model's forward, on the model's device.

    A tuple is the positional arguments, a dict the keyword arguments, a DataLoader gives its first batch (see
    `examples`), anything else, a list of images too, is the only argument.

    Raises TypeError where there is no tensor, ValueError for an empty one and for values that are not finite.
    """
    if isinstance(inputs, DataLoader):
        inputs = examples(inputs, model)
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


def examples(loader: DataLoader[Any], model: nn.Module, count: int = 1) -> Any:
    """Return the first `count` inputs of a DataLoader, a whole batch at least where they are no tensors.

    Of a pair they are the first, images without labels; of a dictionary what the model's forward takes by these names,
    or else what is called as images are.

    Raises ValueError for an empty loader, TypeError for a dictionary that has nothing for the forward.
    """
    taken: list[dict[str, Any]] = []
    for batch in loader:
        found = _inputs_of(batch, model)
        named = dict(found) if isinstance(found, Mapping) else {"": found}
        if not all(isinstance(value, Tensor) and value.ndim for value in named.values()):
            return found
        if taken and [(k, v.shape[1:]) for k, v in named.items()] != [(k, v.shape[1:]) for k, v in taken[0].items()]:
            break
        taken.append(named)
        if sum(len(next(iter(one.values()))) for one in taken) >= count:
            break
    if not taken:
        raise ValueError("the DataLoader is empty")
    stacked = {name: torch.cat([one[name] for one in taken]) for name in taken[0]}
    if count > 1:
        stacked = {name: value[:count] for name, value in stacked.items()}
    return stacked.get("", stacked)


def _inputs_of(batch: Any, model: nn.Module) -> Any:
    """Choose the inputs of a DataLoader's batch."""
    if isinstance(batch, list | tuple):
        return list(batch[0]) if isinstance(batch[0], tuple) else batch[0]  # images that were not stacked
    if not isinstance(batch, Mapping):
        return batch
    parameters = inspect.signature(model.forward).parameters
    accepted = {key: value for key, value in batch.items() if key in parameters}
    if accepted:
        return accepted
    image = next((batch[name] for name in _IMAGES if name in batch), None)
    if image is None:
        raise TypeError(
            f"the DataLoader gives dictionaries of {', '.join(map(str, batch))}, and the forward of "
            f"{type(model).__name__} takes {', '.join(parameters) or 'nothing'}: give the inputs themselves"
        )
    return image


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
