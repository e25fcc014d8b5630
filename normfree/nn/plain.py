"""Torch's weight layers: of which class a module is, and with what arguments another one like it is made."""

from typing import Any

from torch import nn

KINDS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


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
