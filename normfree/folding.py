"""Effective weights baked into plain layers: the same network, for inference and export."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.padding import SamePadding
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.surgery import constructor_arguments, copied, kind_of, replace_modules
from normfree.nn.weight_pass import detach


class _Folded(nn.Module):
    """A plain layer whose weight was computed from parameters that are gone: it does not train."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError("this network was folded for inference: train the one that it was made from")
        return super().train(mode)


class FoldedConv1d(_Folded, SamePadding, nn.Conv1d):
    """`torch.nn.Conv1d` that holds an effective weight."""


class FoldedConv2d(_Folded, SamePadding, nn.Conv2d):
    """`torch.nn.Conv2d` that holds an effective weight."""


class FoldedConv3d(_Folded, SamePadding, nn.Conv3d):
    """`torch.nn.Conv3d` that holds an effective weight."""


class FoldedConvTranspose1d(_Folded, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` that holds an effective weight."""


class FoldedConvTranspose2d(_Folded, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` that holds an effective weight."""


class FoldedConvTranspose3d(_Folded, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` that holds an effective weight."""


class FoldedLinear(_Folded, nn.Linear):
    """`torch.nn.Linear` that holds an effective weight."""


# Attributes of our layers and of timm's, which mean nothing to a plain one.
_DROPPED = ("_digits", "_initial_skip_gain", "same_pad", "scale", "standardize", "recompute_weight")

_FOLDED: dict[type[nn.Module], Any] = {
    folded.__bases__[-1]: folded
    for folded in (
        FoldedConv1d, FoldedConv2d, FoldedConv3d, FoldedConvTranspose1d, FoldedConvTranspose2d, FoldedConvTranspose3d,
        FoldedLinear,
    )
}  # fmt: skip


def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Put a plain layer in the place of every `ScaledWS…` and of timm's `ScaledStdConv2d(Same)`.

    The plain layer holds the effective weight and bias, so outputs are equal up to rounding and nothing is computed
    from weights any more. The result is in eval mode, its folded parameters need no gradient, and putting it into
    training mode raises RuntimeError.

    Args:
        model: Network of ours, converted, or of timm's normalizer-free ones.
        inplace: Fold the model itself rather than a copy.

    Returns:
        The folded network.

    Raises:
        ValueError: Where there is nothing to fold.
    """
    model = model if inplace else copied(model)
    model.eval()
    replacements: dict[nn.Module, nn.Module] = {}  # a module that stands in several places stays one module
    for module in list(model.modules()):
        if isinstance(module, ScaledWS) or _is_timm_scaled(module):
            replacements[module] = _plain(module)
    if not replacements:
        raise ValueError(f"{type(model).__name__} has no layer with scaled standardized weights: nothing to fold")
    detach(model)
    return replace_modules(model, replacements, dropped=_DROPPED)


def has_scaled_layers(model: nn.Module) -> bool:
    """Tell whether `fold` has something to fold."""
    return any(isinstance(module, ScaledWS) or _is_timm_scaled(module) for module in model.modules())


def _plain(layer: Any) -> nn.Module:
    with torch.no_grad():
        weight, bias = layer.effective_parameters() if isinstance(layer, ScaledWS) else _timm_parameters(layer)
    if getattr(layer, "written", None) is not None:
        return _written(layer, weight, bias)
    kind = kind_of(layer)
    assert kind is not None
    arguments = constructor_arguments(layer)
    if getattr(layer, "same_pad", False):  # timm's Same variant pads like TensorFlow where its padding is no constant
        arguments["padding"] = "same"
    with torch.device("meta"):
        plain: Any = _FOLDED[kind](**arguments, bias=bias is not None)
    plain.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(weight), requires_grad=False)  # in its layout
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain.eval()


def _written(layer: ScaledWS, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return the layer of somebody's class that the layer computes as, with the effective weight and bias."""
    plain: Any = copy.copy(layer.written)
    vars(plain)["_parameters"] = {}
    plain.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(weight), requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain.eval()


def _is_timm_scaled(module: nn.Module) -> bool:
    return type(module).__name__ in ("ScaledStdConv2d", "ScaledStdConv2dSame") and isinstance(module, nn.Conv2d)


def _timm_parameters(conv: Any) -> tuple[Tensor, Tensor | None]:
    """Compute gain · scale · (W − mean(W)) · rsqrt(var(W) + eps): timm adds eps where the authors clamp."""
    variance, mean = torch.var_mean(conv.weight, dim=(1, 2, 3), correction=0, keepdim=True)
    gain = conv.gain.view(-1, 1, 1, 1) * conv.scale
    return (conv.weight - mean) * torch.rsqrt(variance + conv.eps) * gain, conv.bias
