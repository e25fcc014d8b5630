"""Transposed convolutions with scaled standardized weights."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.scaled_layer import SCALES_DOC, ScaledWS

_Transpose = nn.modules.conv._ConvTransposeNd


class _ScaledWSConvTranspose(ScaledWS, _Transpose):
    """What `ScaledWSConvTranspose1d`, `2d` and `3d` share."""

    def filters(self, weight: Tensor) -> Tensor:
        """(in_channels, out_channels / groups, …) as (out_channels, in_channels / groups, …), and back."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def unfilters(self, filters: Tensor) -> Tensor:
        """`filters` is its own inverse."""
        return self.filters(filters)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
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


_DOC = """{n}-D transposed convolution with scaled weight standardization.

    Input (N, in_channels, {axes}), output (N, out_channels, {out}); all arguments of `torch.nn.ConvTranspose{n}d`, and

    {scales}

    A filter is all that is multiplied for one channel of the output, N = in_channels / groups · the kernel's size. With
    a stride s a position of the output sees one part in s{power} of it, so that the variance is smaller by that: the
    in_scale that makes up for it is √s{power}.
    """


class ScaledWSConvTranspose1d(_ScaledWSConvTranspose, nn.ConvTranspose1d):
    __doc__ = _DOC.format(n=1, axes="L", out="L'", power="", scales=SCALES_DOC)


class ScaledWSConvTranspose2d(_ScaledWSConvTranspose, nn.ConvTranspose2d):
    __doc__ = _DOC.format(n=2, axes="H, W", out="H', W'", power="²", scales=SCALES_DOC)


class ScaledWSConvTranspose3d(_ScaledWSConvTranspose, nn.ConvTranspose3d):
    __doc__ = _DOC.format(n=3, axes="D, H, W", out="D', H', W'", power="³", scales=SCALES_DOC)
