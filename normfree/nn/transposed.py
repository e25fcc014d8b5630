"""Transposed convolutions with scaled standardized weights."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.arguments import checked, require_positive
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.standardization import EPS
from normfree.nn.symbolic import call_symbolically, is_symbolic

_Transpose = nn.modules.conv._ConvTransposeNd


class _ScaledWSConvTranspose(ScaledWS, _Transpose):
    """Base of `ScaledWSConvTranspose1d`, `2d` and `3d`."""

    @checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
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
        """Make the layer; the arguments up to `dtype` are those of torch's transposed convolution.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            kernel_size: Positions that a filter covers, per axis.
            stride: Step between the output's positions of neighbouring inputs.
            padding: Positions cut off on each side, less those of the kernel.
            output_padding: Positions added at the end.
            groups: Blocks that channels are connected in.
            bias: Whether the output has a learnable bias.
            dilation: Distance between a filter's positions.
            padding_mode: "zeros", the only one that torch has.
            device: Device of the parameters.
            dtype: Dtype of the parameters.
            in_scale: Factor that the input needs: the activation's γ times the block's β.
            out_scale: Factor that the output needs: the branch's α.
            skip_gain: Initial value of a learnable factor of the output (SkipInit); None for none.
            eps: Clamp on N · var(W).
            standardize: False leaves the filters as they are.

        Raises:
            ValueError: For what torch's class refuses, for sizes below 1, and for eps ≤ 0.
        """
        require_positive(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
            in_scale=in_scale, out_scale=out_scale, skip_gain=skip_gain, eps=eps, standardize=standardize,
        )  # fmt: skip

    def filters(self, weight: Tensor) -> Tensor:
        """Return (in_channels, out_channels / groups, …) as (out_channels, in_channels / groups, …), and back."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def unfilters(self, filters: Tensor) -> Tensor:
        """Undo `filters`, which is its own inverse."""
        return self.filters(filters)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve, transposed, with the effective weight and bias."""
        if is_symbolic(input):
            return call_symbolically(self, input, *(() if output_size is None else (output_size,)))
        spatial = len(self.kernel_size)
        call: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
        sizes: Any = (self.stride, self.padding, self.kernel_size, spatial, self.dilation)
        added = self._output_padding(input, output_size, *sizes)
        return self._with_effective_parameters(
            input,
            lambda weight, bias: call(
                input, weight, bias, self.stride, self.padding, added, self.groups, self.dilation
            ),
        )  # fmt: skip


class ScaledWSConvTranspose1d(_ScaledWSConvTranspose, nn.ConvTranspose1d):
    """Transposed convolution in one dimension with scaled weight standardization.

    Input (N, in_channels, L), output (N, out_channels, L'). See `ScaledWSConvTranspose2d`.
    """


class ScaledWSConvTranspose2d(_ScaledWSConvTranspose, nn.ConvTranspose2d):
    """Transposed convolution in two dimensions with scaled weight standardization; see `ScaledWSConv2d`.

    Input (N, in_channels, H, W), output (N, out_channels, H', W'). A filter is all that is multiplied for one channel
    of the output, N = in_channels / groups · the kernel's size. With a stride s a position of the output sees one part
    in s² of it, so that the variance is smaller by that: the in_scale that makes up for it is √s² (√s and √s³ in one
    and three dimensions).
    """


class ScaledWSConvTranspose3d(_ScaledWSConvTranspose, nn.ConvTranspose3d):
    """Transposed convolution in three dimensions with scaled weight standardization.

    Input (N, in_channels, D, H, W), output (N, out_channels, D', H', W'). See `ScaledWSConvTranspose2d`.
    """
