"""Convolutions with scaled standardized weights: everything that a normalizer would do, done to the weights."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.recompute import recomputing
from normfree.nn.scales import Scales
from normfree.nn.standardize import EPS, standardize

# Computing an effective weight again in the backward pass saves memory and, where there are many activations, next to
# no time. A weight that outnumbers them so many times is kept.
_KEEP_ABOVE = 8


def same_padding(size: int, kernel_size: int, stride: int, dilation: int = 1) -> int:
    """Total padding along one axis that makes the output ⌈size / stride⌉ long; the odd one goes to the end (SAME)."""
    extent = dilation * (kernel_size - 1) + 1
    # Not -(-size // stride): integer division of ONNX truncates.
    total = ((size + stride - 1) // stride - 1) * stride + extent - size
    # A kernel smaller than its stride may leave input over. In an export, where the size may be a symbol, that is cut
    # off: all convolutions of a stride then have the same formula for the size of their output.
    return total if extent >= stride or torch.compiler.is_exporting() else max(total, 0)


def both_sides(total: int) -> tuple[Any, Any]:
    """How a total padding is shared; what is cut off rather than added is cut at the end."""
    start = torch.sym_max(total, 0) // 2
    return start, total - start


class SamePadding(nn.modules.conv._ConvNd):
    """Adds padding="same" with any stride to a convolution of torch, which knows it without strides only."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        same = padding == "same"
        plain_padding: Any = 0 if same else padding
        super().__init__(in_channels, out_channels, kernel_size, stride, plain_padding, *args, **kwargs)
        if same:
            self.padding = "same"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding != "same":
            return super()._conv_forward(input, weight, bias)
        spatial = len(self.kernel_size)
        total = [
            same_padding(*axis)
            for axis in zip(input.shape[-spatial:], self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        padding = [t // 2 for t in total]
        # In an export the sizes may be symbols, whose parity nobody knows.
        exporting = torch.compiler.is_exporting() and any(s > 1 for s in self.stride)
        if self.padding_mode != "zeros" or exporting or any(t % 2 for t in total):
            # torch.nn.functional.pad counts axes from the last
            pads = [side for t in reversed(total) for side in both_sides(t)]
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            padded = F.pad(input, pads, mode)
            with recomputing(padded, lambda unpadded: F.pad(unpadded, pads, mode), input):
                return self._convolve(padded, weight, bias, [0] * spatial)
        return self._convolve(input, weight, bias, padding)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(padding) - 1]
        return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class SameConv2d(SamePadding, nn.Conv2d):
    """`torch.nn.Conv2d` whose padding="same" may have a stride, then as in TensorFlow and JAX: see `ScaledWSConv2d`."""


class ScaledWS(Scales, SamePadding):
    """What `ScaledWSConv1d`, `2d` and `3d` share; comes before torch's class in the method resolution order."""

    in_scale: Tensor
    out_scale: Tensor
    gain: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        in_scale: float = 1.0,
        out_scale: float = 1.0,
        skip_gain: float | None = None,
        eps: float = EPS,
        standardize: bool = True,
    ) -> None:
        if not eps > 0:
            raise ValueError(f"eps is {eps}; it must be positive, or constant filters divide by zero")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.eps = eps
        self.standardize = standardize
        self._register_scales(self.weight, in_scale=in_scale, out_scale=out_scale, skip_gain=skip_gain)
        self.gain = nn.Parameter(self.weight.new_empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights N(0, 1/fan_in), or N(0, 2/fan_in) (He) without standardization; gains 1, biases 0."""
        if "gain" not in self._parameters:
            return  # torch's constructor calls this before the gains exist
        fan_in = self.weight[0].numel()
        with torch.no_grad():
            self.weight.normal_(0, math.sqrt((1 if self.standardize else 2) / fan_in))
            self.gain.fill_(1)
            if self.bias is not None:
                self.bias.zero_()
        self.reset_scales()

    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """W_eff, of the weight's shape, and b_eff (out_channels,) or None: those of the plain convolution that this is.

        W_eff = in_scale · out_scale · skip_gain · gain ⊙ (W − mean(W)) · rsqrt(max(N · var(W), eps))
        b_eff = out_scale · skip_gain · bias
        """
        weight_scale, bias = self._scale_and_bias()
        return self._effective_weight(self.weight, weight_scale), bias

    def _scale_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """What multiplies the standardized filters, (out_channels,), and b_eff."""
        out_scale = self.out_scale if self.skip_gain is None else self.out_scale * self.skip_gain
        bias = None if self.bias is None else self.bias * out_scale.to(self.bias.dtype)
        return self.gain * (self.in_scale * out_scale), bias

    def _effective_weight(self, weight: Tensor, scale: Tensor) -> Tensor:
        if self.standardize:
            return standardize(weight, scale, self.eps)
        return weight * scale.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))

    def forward(self, input: Tensor) -> Tensor:
        weight_scale, bias = self._scale_and_bias()
        weight = self._effective_weight(self.weight, weight_scale)
        if weight.numel() > _KEEP_ABOVE * input.numel():
            return self._conv_forward(input, weight, bias)
        with recomputing(weight, self._effective_weight, self.weight, weight_scale):
            return self._conv_forward(input, weight, bias)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.skip_gain is not None:
            parts.append("skip_gain=True")
        if not self.standardize:
            parts.append("standardize=False")
        return ", ".join(parts)


_DOC = """{n}-D convolution with scaled weight standardization (Brock et al. 2021, section 4.1).

    Input (N, in_channels, {axes}), output (N, out_channels, {out}); all arguments of `torch.nn.Conv{n}d`, and

    padding="same"   also with a stride, then as in TensorFlow and JAX: the output is ⌈size / stride⌉ long, an odd
                     padding element goes to the end
    in_scale         what the input must be multiplied by: the activation's γ, the block's β
    out_scale        what the output must be multiplied by: the branch's α
    skip_gain        initial value of a learnable scalar that multiplies the output (SkipInit); None: there is none
    eps              clamp on N · var(W)
    standardize      False leaves the filters as they are: the ablation that shows the mean shift

    All three scales are carried by the weight, `effective_parameters()`: no pass over activations. `gain` is
    (out_channels,). `in_scale` and `out_scale` are persistent float32 buffers (float64 in a float64 layer).

    Raises ValueError for what torch's class refuses, and for eps ≤ 0.
    """


class ScaledWSConv1d(ScaledWS, nn.Conv1d):
    __doc__ = _DOC.format(n=1, axes="L", out="L'")


class ScaledWSConv2d(ScaledWS, nn.Conv2d):
    __doc__ = _DOC.format(n=2, axes="H, W", out="H', W'")


class ScaledWSConv3d(ScaledWS, nn.Conv3d):
    __doc__ = _DOC.format(n=3, axes="D, H, W", out="D', H', W'")
