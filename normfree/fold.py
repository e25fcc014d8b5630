"""Effective weights baked into plain convolutions: the same network, for inference and export."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.conv import SamePadding, ScaledWS


class _Folded(SamePadding):
    """A plain convolution whose weight was computed from parameters that are gone: it does not train."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError("this network was folded for inference: train the one that it was made from")
        return super().train(mode)


class FoldedConv1d(_Folded, nn.Conv1d):
    """`torch.nn.Conv1d` that holds an effective weight."""


class FoldedConv2d(_Folded, nn.Conv2d):
    """`torch.nn.Conv2d` that holds an effective weight."""


class FoldedConv3d(_Folded, nn.Conv3d):
    """`torch.nn.Conv3d` that holds an effective weight."""


def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """`model` with a plain convolution in place of every `ScaledWSConv1d/2d/3d` and of timm's `ScaledStdConv2d(Same)`.

    The plain convolution holds the effective weight and bias, so outputs are equal up to rounding and nothing is
    computed from weights any more. The result is in eval mode, its folded parameters need no gradient, and putting it
    into training mode raises RuntimeError. A copy is folded unless `inplace`.

    Raises ValueError where there is nothing to fold.
    """
    model = model if inplace else copy.deepcopy(model)
    model.eval()
    replacements: dict[nn.Module, nn.Module] = {}  # a module that stands in several places stays one module
    for module in list(model.modules()):
        if isinstance(module, ScaledWS) or _is_timm_scaled(module):
            replacements[module] = _plain(module)
    if not replacements:
        raise ValueError(f"{type(model).__name__} has no scaled weight-standardized convolution: nothing to fold")
    if model in replacements:
        return replacements[model]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in replacements:
                module._modules[name] = replacements[child]
    return model


def has_scaled_convolutions(model: nn.Module) -> bool:
    """Whether `fold` has something to fold."""
    return any(isinstance(module, ScaledWS) or _is_timm_scaled(module) for module in model.modules())


def _plain(conv: Any) -> nn.Module:
    kind = (FoldedConv1d, FoldedConv2d, FoldedConv3d)[conv.weight.ndim - 3]
    with torch.no_grad():
        weight, bias = conv.effective_parameters() if isinstance(conv, ScaledWS) else _timm_parameters(conv)
    # timm's Same variant pads like TensorFlow where its padding cannot be a constant.
    padding = "same" if getattr(conv, "same_pad", False) else conv.padding
    with torch.device("meta"):
        plain = kind(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups,
            bias is not None, conv.padding_mode,
        )  # fmt: skip
    plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain.eval()


def _is_timm_scaled(module: nn.Module) -> bool:
    return type(module).__name__ in ("ScaledStdConv2d", "ScaledStdConv2dSame") and isinstance(module, nn.Conv2d)


def _timm_parameters(conv: Any) -> tuple[Tensor, Tensor | None]:
    """gain · scale · (W − mean(W)) · rsqrt(var(W) + eps): timm adds eps where the authors clamp."""
    variance, mean = torch.var_mean(conv.weight, dim=(1, 2, 3), correction=0, keepdim=True)
    gain = conv.gain.view(-1, 1, 1, 1) * conv.scale
    return (conv.weight - mean) * torch.rsqrt(variance + conv.eps) * gain, conv.bias
