"""Weight layers of torch, and how a module is replaced wherever it stands."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from normfree import _torch

KINDS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
# Attributes by which a normalizer normalizes.
_NORM_ATTRIBUTES = {name for norm in (nn.BatchNorm1d(1), nn.GroupNorm(1, 1), nn.LayerNorm(1)) for name in vars(norm)}


def refuse_sharded(model: nn.Module) -> None:
    """Raise ValueError for parameters that are spread over processes, as FSDP leaves them."""
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(f"{name} is sharded over processes: take the network before it is sharded")


class Copy(nn.Module):
    """Copy of the input: the stand-in for a normalizer whose output is written into."""

    def forward(self, x: Tensor) -> Tensor:
        """Copy x."""
        return x.clone()


class Removed(nn.Identity):
    """Identity in the place of a normalizer; with `copies` its output may be written into.

    It has no statistics: tools that merge those into the layer before would read that layer's raw weight.

    Attributes:
        channels: Number of channels.
        kind: Class of torch that normalized, if it was a BatchNorm.
        carrier: Layer that has taken over scale and shift, if there is one. It is no child.
    """

    __jit_ignored_attributes__ = ("carrier",)  # TorchScript has no type for it

    def __init__(self, channels: int, kind: type[nn.Module] | None, *, copies: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.kind = kind
        self.copies = copies
        self.carry_by(None)

    def carry_by(self, layer: nn.Module | None) -> None:
        """Set the carrier."""
        vars(self)["carrier"] = layer

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, or a copy."""
        return input.clone() if self.copies else input

    def __getattr__(self, name: str) -> Any:
        """Say what to do where a normalizer's statistics are missing."""
        if name in ("running_mean", "running_var", "weight", "bias", "eps"):
            raise AttributeError(f"this normalizer was removed and has no {name}: `normfree.fold` merges layers")
        return super().__getattr__(name)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the one of `KINDS` that a module is an instance of."""
    return next((kind for kind in KINDS if isinstance(module, kind)), None)


def copied(model: nn.Module) -> Any:
    """Copy a model, tensors that its forward has left in attributes too (torch's `deepcopy` refuses their history).

    Raises TypeError, which names the module, for what cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _torch.leaves([value for name, value in vars(module).items() if name != "_modules"]):
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        path, attribute = next(filter(None, map(_uncopied, *zip(*model.named_modules(), strict=True))), ("", ""))
        place = f"the attribute {attribute!r} of {path or 'the model'}" if attribute else f"{type(model).__name__}"
        raise TypeError(
            f"{place} cannot be copied ({type(error).__name__}: {error}): take it away for the time, or give "
            "inplace=True"
        ) from error


def _uncopied(path: str, module: nn.Module) -> tuple[str, str] | None:
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            try:
                copy.deepcopy(value)
            except Exception:
                return path, name
    return None


def constructor_arguments(layer: Any) -> dict[str, Any]:
    """Return what the class of a weight layer was called with, but for bias, device and dtype."""
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if layer.transposed:
        names.append("output_padding")
    return {name: getattr(layer, name) for name in names}


def replace_modules(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module], *, dropped: Collection[str] = ()
) -> nn.Module:
    """Replace modules wherever they stand in the tree of `model`, and return the model, or its own replacement.

    A replacement gets the hooks of the module's calls and the attributes that its user gave it; `dropped` names
    attributes of the replaced class, which nobody gave.
    """
    for old, new in replacements.items():
        _transfer_attributes(old, new, dropped)
    for module in list(model.modules()):
        if isinstance(module, Removed) and module.carrier is not None:
            module.carry_by(replacements.get(module.carrier, module.carrier))
        for name, child in module._modules.items():
            if child is not None and child in replacements:
                module._modules[name] = replacements[child]
    return replacements.get(model, model)


def _transfer_attributes(old: nn.Module, new: nn.Module, dropped: Collection[str]) -> None:
    for name, value in vars(old).items():
        if name in _HOOKS or not (name in vars(new) or name in _NORM_ATTRIBUTES or name in dropped):
            vars(new)[name] = value  # itself: handles that remove a hook refer to it
            if name in _HOOKS:
                vars(old)[name] = copy.copy(value)
