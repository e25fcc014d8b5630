"""Merging by other packages: their methods that merge normalizers and branches into one layer, made exact."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from normfree.folding import fold, has_scaled_layers
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.surgery import Removed, replace_modules
from normfree.trace.inputs import tensors

# ultralytics, timm, RepVGG and its followers, torchvision's quantizable networks.
_NAMES = (
    "fuse", "fuse_bn", "fuse_conv_bn", "fuse_convs", "fuse_model", "merge_bn", "reparameterize", "repvgg_convert",
    "switch_to_deploy",
)  # fmt: skip


class _Exact:
    """A method that merges layers, which finds weights and normalizers that compute what the network does.

    One that is given tensors fuses features, as in a forward pass, and is left alone. Copies and pickles with its
    module.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.module), self.name)
        if tensors((args, kwargs)):
            return method(self.module, *args, **kwargs)
        if has_scaled_layers(self.module):
            fold(self.module, inplace=True)
        with _with_norms(self.module):
            return method(self.module, *args, **kwargs)


@contextlib.contextmanager
def _with_norms(model: nn.Module) -> Iterator[None]:
    """Put a BatchNorm into the place of each that was removed: the identity, but for the bias of the layer before.

    Such methods read statistics and shifts of normalizers, and some no bias of a convolution before one.
    """
    norms: dict[Any, Any] = {}
    inside: set[Any] = set(model.modules())
    for module in inside:
        if isinstance(module, Removed) and module.kind is not None:
            norm: Any = module.kind(module.channels, eps=0.0).eval().requires_grad_(False)
            carrier: Any = module.carrier if module.carrier in inside else None
            if carrier is not None:
                norm.to(carrier.weight)
                if carrier.bias is not None:
                    norm.bias, carrier.bias = carrier.bias, None
            norms[module] = norm
    replace_modules(model, norms)
    try:
        yield
    finally:
        left: set[Any] = set(model.modules())
        for module, norm in norms.items():
            carrier = module.carrier
            if norm in left and carrier in left and carrier.bias is None and bool(norm.bias.any()):
                carrier.bias = norm.bias
        replace_modules(model, {norm: module for module, norm in norms.items()})


def prepare_merging(model: nn.Module) -> None:
    """Make the methods exact by which other packages merge the layers of a converted network."""
    for module in model.modules():
        if any(isinstance(part, ScaledWS | Removed) for part in module.modules()):
            for name in _NAMES:
                if callable(getattr(type(module), name, None)) and name not in vars(module):
                    vars(module)[name] = _Exact(module, name)
