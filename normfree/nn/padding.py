"""Padding as TensorFlow and JAX know it (SAME), also with a stride."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree._torch import is_scripting, is_tracing, script_if_tracing
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
        self.pads_same = same  # for TorchScript, in which `padding` cannot be a text or a tuple
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

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(padding) - 1]
        return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)


@script_if_tracing
def padded_in_script(
    input: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], mode: str, value: float
) -> Tensor:
    """Pad as SAME does, for any size of the input, in the part of Python that TorchScript knows."""
    pads: list[int] = []
    axes = len(kernel_size)
    for index in range(axes):
        axis = axes - 1 - index
        size = input.shape[input.dim() - 1 - index]
        extent = dilation[axis] * (kernel_size[axis] - 1) + 1
        total = max(0, (size - 1) // stride[axis] * stride[axis] + extent - size)
        pads.append(total // 2)
        pads.append(total - total // 2)
    return F.pad(input, pads, mode, value)


class _SameConv(SamePadding):
    """A convolution that TorchScript can read and trace. It reads on behind an `if`, but not an `else` to itself."""

    def _call(self, input: Tensor) -> Tensor:
        if is_symbolic(input):
            symbolic: Tensor = call_symbolically(self, input)
            return symbolic
        if is_tracing() and self.pads_same:
            return self._convolve(self._padded_in_script(input), self.weight, self.bias, [0] * len(self.kernel_size))
        return self._conv_forward(input, self.weight, self.bias)

    def _padded_in_script(self, input: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        if self.pads_same:
            axes = list(self.kernel_size), list(self.stride), list(self.dilation)
            return padded_in_script(input, axes[0], axes[1], axes[2], mode, 0.0)
        return F.pad(input, [int(pad) for pad in self._reversed_padding_repeated_twice], mode)


class SameConv1d(_SameConv, nn.Conv1d):
    """`torch.nn.Conv1d` whose padding="same" may have a stride, then as in TensorFlow and JAX: see `ScaledWSConv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        if is_scripting():
            x = self._padded_in_script(input)
            return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        else:
            return self._call(input)


class SameConv2d(_SameConv, nn.Conv2d):
    """`torch.nn.Conv2d` whose padding="same" may have a stride, then as in TensorFlow and JAX: see `ScaledWSConv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        if is_scripting():
            x = self._padded_in_script(input)
            return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        else:
            return self._call(input)


class SameConv3d(_SameConv, nn.Conv3d):
    """`torch.nn.Conv3d` whose padding="same" may have a stride, then as in TensorFlow and JAX: see `ScaledWSConv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        if is_scripting():
            x = self._padded_in_script(input)
            return F.conv3d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        else:
            return self._call(input)
