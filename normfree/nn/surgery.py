"""Torch's weight layers: of which class a module is, how another one like it is made, and how it takes its place."""

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

KINDS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
# What says how a normalizer normalizes.
_NORM_ATTRIBUTES = {name for norm in (nn.BatchNorm1d(1), nn.GroupNorm(1, 1), nn.LayerNorm(1)) for name in vars(norm)}


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The one of `KINDS` that it is an instance of."""
    return next((kind for kind in KINDS if isinstance(module, kind)), None)


def arguments_of(layer: Any) -> dict[str, Any]:
    """What the class of a weight layer was called with, but for bias, device and dtype."""
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if layer.transposed:
        names.append("output_padding")
    return {name: getattr(layer, name) for name in names}


def take_place(old: nn.Module, new: nn.Module, but_for: Collection[str] = ()) -> None:
    """Give `new`, which replaces `old`, the hooks of its calls and the attributes that its user gave it.

    `but_for` are attributes of the class of `old`.
    """
    for name, value in vars(old).items():
        if name in _HOOKS or not (name in vars(new) or name in _NORM_ATTRIBUTES or name in but_for):
            vars(new)[name] = value  # itself: handles that remove a hook refer to it
            if name in _HOOKS:
                vars(old)[name] = copy.copy(value)
