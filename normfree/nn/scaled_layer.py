"""Base of layers with scaled standardized weights: all that a normalizer would do, done to the weights."""

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.recompute import recomputing
from normfree.nn.scales import Scales
from normfree.nn.standardization import standardize

# Computing an effective weight again in the backward pass saves memory and, where there are many activations, next to
# no time. A weight that outnumbers them so many times is kept.
_KEEP_ABOVE = 8


class ScaledWS(Scales):
    """Scaled weight standardization for a weight layer of torch, before which it comes in the method resolution order.

    W_eff and b_eff carry every scalar, so that none is left for a pass over activations:

        W_eff = in_scale · out_scale · skip_gain · gain ⊙ (W − mean(W)) · rsqrt(max(N · var(W), eps))
        b_eff = out_scale · skip_gain · bias

    per output channel, N = fan-in. `gain` is (out_channels,), `skip_gain` (1,); `in_scale` and `out_scale` are
    persistent float32 buffers (float64 in a float64 layer). `out_channels` and `channel_axis` say what the output's
    channels are and where it has them.
    """

    in_scale: Tensor
    gain: nn.Parameter
    weight: Tensor
    bias: Tensor | None
    out_channels: int
    channel_axis = 1

    def __init__(
        self, *args: Any, in_scale: float, out_scale: float, skip_gain: float | None, eps: float, standardize: bool
    ) -> None:
        if not eps > 0:
            raise ValueError(f"eps is {eps}; it must be positive, or constant filters divide by zero")
        super().__init__(*args)
        self.eps = eps
        self.standardize = standardize
        self._register_scales(self.weight, in_scale=in_scale, out_scale=out_scale, skip_gain=skip_gain)
        self.gain = nn.Parameter(self.weight.new_empty(self.out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1/fan_in), or N(0, 2/fan_in) (He) without standardization; gains 1, biases 0.

        The SkipInit gain gets its initial value; `in_scale` and `out_scale` stay as they are.
        """
        if "gain" not in self._parameters:
            return  # torch's constructor calls this before the gains exist
        fan_in = self.weight.numel() // self.out_channels
        with torch.no_grad():
            self.weight.normal_(0, math.sqrt((1 if self.standardize else 2) / fan_in))
            self.gain.fill_(1)
            if self.bias is not None:
                self.bias.zero_()
        super().reset_parameters()

    def filters(self, weight: Tensor) -> Tensor:
        """Return the weight as (out_channels, …), a filter for each channel of the output."""
        return weight

    def unfilters(self, filters: Tensor) -> Tensor:
        """Undo `filters`."""
        return filters

    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return W_eff, of the weight's shape, and b_eff, (out_channels,) or None: those of an equal plain layer."""
        kernels = self._kernels()
        if kernels is not None:
            return kernels.effective_parameters(*self._factors(), eps=self.eps, dtype=self.weight.dtype)
        weight_scale, bias = self._scale_and_bias()
        return self._effective_weight(self.weight, weight_scale), bias

    def _scale_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the factors of the standardized filters, (out_channels,), and b_eff."""
        out_scale = self._out_scale()
        bias = None if self.bias is None else self.bias * out_scale.to(self.bias.dtype)
        return self.gain * (self.in_scale * out_scale), bias

    def _effective_weight(self, weight: Tensor, scale: Tensor) -> Tensor:
        filters = self.filters(weight)
        if self.standardize:
            return self.unfilters(standardize(filters, scale, self.eps))
        return self.unfilters(filters * scale.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1)))

    def _with_effective_parameters(self, input: Tensor, call: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """Return call(W_eff, b_eff), which takes `input`; W_eff is computed again in the backward pass where cheap."""
        kernels = self._kernels()
        sources: tuple[Tensor | None, ...]
        if kernels is None:
            weight_scale, bias = self._scale_and_bias()
            compute, sources = self._effective_weight, (self.weight, weight_scale)
            weight = compute(*sources)
        else:
            both = functools.partial(kernels.effective_parameters, eps=self.eps, dtype=_autocast_dtype(self.weight))
            compute, sources = (lambda *factors: both(*factors)[0]), self._factors()
            weight, bias = both(*sources)
        if weight.dtype != self.weight.dtype or weight.numel() > _KEEP_ABOVE * input.numel():
            return call(weight, bias)
        with recomputing(weight, compute, *sources):
            return call(weight, bias)

    def _kernels(self) -> Any:
        """Return the module of fused kernels where they can be used, or None."""
        if not (self.weight.is_cuda and self.standardize and type(self).filters is ScaledWS.filters):
            return None
        kernels = None if torch.compiler.is_compiling() else _import_fused()
        return kernels if kernels is not None and kernels.supports(*self._factors()) else None

    def _factors(self) -> tuple[Tensor | None, ...]:
        """Return the factors of W_eff and b_eff, in the order of the fused kernels."""
        return self.weight, self.gain, self.bias, self.in_scale, self.out_scale, self.skip_gain

    def extra_repr(self) -> str:
        """Show what differs from a plain layer."""
        parts = [super().extra_repr()]
        if self.skip_gain is not None:
            parts.append("skip_gain=True")
        if not self.standardize:
            parts.append("standardize=False")
        return ", ".join(parts)


@functools.cache
def _import_fused() -> Any:
    """Import the fused kernels where Triton is, which torch brings along for its GPUs; else warn, and give None."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn("weights are standardized by slower kernels: triton is not installed", stacklevel=2)
        return None
    from normfree.nn import fused

    return fused


def _autocast_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that a convolution or a linear layer gives the weight under autocast."""
    kind = weight.device.type
    rounded = weight.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if rounded else weight.dtype
