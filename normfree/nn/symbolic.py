"""Layers as leaves of a symbolic trace by `torch.fx`, which looks into every module that is not torch's."""

from typing import Any

import torch.fx
from torch import Tensor, nn


def is_symbolic(value: Any) -> bool:
    """Tell whether `torch.fx` traces with this instead of a tensor."""
    return type(value) is not Tensor and isinstance(value, torch.fx.Proxy)


def call_symbolically(layer: nn.Module, proxy: Any, *args: Any) -> Any:
    """Record one call of the layer, whatever happens inside."""
    tracer = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (proxy, *args), {})
