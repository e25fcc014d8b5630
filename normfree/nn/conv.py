"""Convolutions with scaled standardized weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normfree import _torch
from normfree.arguments import checked, require_positive
from normfree.nn.matrix_form import prefers_matrix_form
from normfree.nn.padding import SamePadding
from normfree.nn.products import Window, convolve_as_product, patches_of, prefers_product
from normfree.nn.recompute import nobody_else_saves
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.standardization import EPS
from normfree.nn.symbolic import call_symbolically, is_symbolic


class _ScaledWSConv(ScaledWS, SamePadding):
    """Base of `ScaledWSConv1d`, `2d` and `3d`."""

    @checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        in_scale: float = 1.0,
        out_scale: float = 1.0,
        skip_gain: float | None = None,
        eps: float = EPS,
        standardize: bool = True,
    ) -> None:
        """Make the layer; the arguments up to `dtype` are those of torch's convolution.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            kernel_size: Positions that a filter covers, per axis.
            stride: Step between positions of the output.
            padding: Positions added on each side, or "valid", or "same", which may have a stride too, then as in
                TensorFlow and JAX: the output is ⌈size / stride⌉ long, an odd padding element goes to the end.
            dilation: Distance between a filter's positions.
            groups: Blocks that channels are connected in.
            bias: Whether the output has a learnable bias.
            padding_mode: "zeros", "reflect", "replicate" or "circular".
            device: Device of the parameters.
            dtype: Dtype of the parameters.
            in_scale: Factor that the input needs: the activation's γ times the block's β.
            out_scale: Factor that the output needs: the branch's α.
            skip_gain: Initial value of a learnable factor of the output (SkipInit); None for none.
            eps: Clamp on N · var(W).
            standardize: False leaves the filters as they are: the ablation that shows the mean shift.

        Raises:
            ValueError: For what torch's class refuses, for sizes below 1, and for eps ≤ 0.
        """
        require_positive(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, in_scale=in_scale, out_scale=out_scale, skip_gain=skip_gain, eps=eps, standardize=standardize,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the effective weight and bias."""
        if is_symbolic(input):
            return call_symbolically(self, input)
        if self.written is not None:
            return self._as_written(input)
        if self._may_take_matrix_form(input) and (out := self._convolve_patches(input)) is not None:
            return out
        return self._with_effective_parameters(input, lambda weight, bias: self._conv_forward(input, weight, bias))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super()._conv_forward(input, weight, bias)
        return self._convolve(input, weight, bias, self.padding)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
        if (
            self.groups == 1
            and type(input) is Tensor
            and input.is_cpu
            and input.dtype is weight.dtype is torch.float32
            and input.ndim == weight.ndim
            and input.shape[1] == self.in_channels
            and not torch.is_autocast_enabled("cpu")
            and _torch.nobody_sees_operations()
            and nobody_else_saves()  # and compares it with what is computed again, perhaps unseen
        ):
            window = Window(self.kernel_size, self.stride, padding, self.dilation)
            if prefers_product(input, window):
                return convolve_as_product(input, weight, bias, window)
        return super()._convolve(input, weight, bias, padding)

    def _convolve_patches(self, input: Tensor) -> Tensor | None:
        """Convolve in matrix form, (N, in_channels, …) to (N, out_channels, …); None where that is not faster."""
        if (
            self.groups > 1
            or input.ndim != 2 + len(self.kernel_size)
            or (input.ndim != 4 and max(self.kernel_size) > 1)
        ):
            return None
        padded = self._padded(input)
        window = Window(self.kernel_size, self.stride, [0] * len(self.kernel_size), self.dilation)
        sizes = window.sizes(padded)
        if min(sizes) < 1 or not prefers_matrix_form(self.weight, len(input) * math.prod(sizes)):
            return None
        out = self._apply_to_patches(patches_of(padded, window).transpose(1, 2).flatten(0, 1))
        if out is None:
            return None
        return out.unflatten(0, (len(input), -1)).transpose(1, 2).unflatten(2, sizes).contiguous()


class ScaledWSConv1d(_ScaledWSConv, nn.Conv1d):
    """Convolution in one dimension with scaled weight standardization, (N, in_channels, L) to (N, out_channels, L').

    See `ScaledWSConv2d`.
    """


class ScaledWSConv2d(_ScaledWSConv, nn.Conv2d):
    """Convolution in two dimensions with scaled weight standardization (Brock et al. 2021, section 4.1).

    Input (N, in_channels, H, W), output (N, out_channels, H', W'). It is the plain convolution with

        W_eff = in_scale · out_scale · skip_gain · gain ⊙ (W − mean(W)) · rsqrt(max(N · var(W), eps))
        b_eff = out_scale · skip_gain · bias

    per output channel, N = fan-in: every scalar of a normalizer-free network is carried by the weight, and no pass over
    activations is left. `gain`, (out_channels,), and `skip_gain`, (1,), are learnable.
    """


class ScaledWSConv3d(_ScaledWSConv, nn.Conv3d):
    """Convolution in three dimensions with scaled weight standardization.

    Input (N, in_channels, D, H, W), output (N, out_channels, D', H', W'). See `ScaledWSConv2d`.
    """
