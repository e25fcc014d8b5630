"""Padding as TensorFlow and JAX know it (SAME), also with a stride."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.recompute import recomputing
from normfree.nn.symbolic import call_symbolically, is_symbolic


def same_padding(size: int, kernel_size: int, stride: int, dilation: int = 1) -> int:
    """Total padding along one axis that makes the output ⌈size / stride⌉ long; the odd one goes to the end (SAME)."""
    extent = dilation * (kernel_size - 1) + 1
    # Not -(-size // stride): integer division of ONNX truncates.
    total = ((size + stride - 1) // stride - 1) * stride + extent - size
    # A kernel smaller than its stride may leave input over. In an export, where the size may be a symbol, that is cut
    # off: all convolutions of a stride then have the same formula for the size of their output.
    return total if extent >= stride or torch.compiler.is_exporting() else max(total, 0)


def pad_both_sides(totals: Sequence[int]) -> list[Any]:
    """Share total paddings, one per axis, between both sides; in the order of `F.pad`, the last axis first.

    An odd element goes to the end, and what is cut off rather than added is cut at the end.
    """
    starts = [torch.sym_max(total, 0) // 2 for total in totals]
    return [
        side for start, total in reversed(list(zip(starts, totals, strict=True))) for side in (start, total - start)
    ]


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

    def _padded(self, input: Tensor) -> Tensor:
        """Return the input, padded, for a convolution without padding."""
        pads: Any = self._reversed_padding_repeated_twice
        if self.padding == "same":
            axes = zip(input.shape[-len(self.kernel_size) :], self.kernel_size, self.stride, self.dilation, strict=True)
            pads = pad_both_sides([same_padding(*axis) for axis in axes])
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, pads, mode) if any(pads) else input

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding != "same":
            return super()._conv_forward(input, weight, bias)
        spatial = len(self.kernel_size)
        sizes = zip(input.shape[-spatial:], self.kernel_size, self.stride, self.dilation, strict=True)
        totals = [same_padding(*axis) for axis in sizes]
        # In an export the sizes may be symbols, whose parity nobody knows.
        exporting = torch.compiler.is_exporting() and any(s > 1 for s in self.stride)
        if self.padding_mode != "zeros" or exporting or any(t % 2 for t in totals):
            pads = pad_both_sides(totals)
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            padded = F.pad(input, pads, mode)
            with recomputing(padded, lambda unpadded: F.pad(unpadded, pads, mode), input):
                return self._convolve(padded, weight, bias, [0] * spatial)
        return self._convolve(input, weight, bias, [t // 2 for t in totals])

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(padding) - 1]
        return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class SameConv2d(SamePadding, nn.Conv2d):
    """`torch.nn.Conv2d` whose padding="same" may have a stride, then as in TensorFlow and JAX: see `ScaledWSConv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        return call_symbolically(self, input) if is_symbolic(input) else super().forward(input)
