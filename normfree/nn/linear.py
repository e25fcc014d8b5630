"""The linear layer with scaled standardized weights."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.arguments import checked, require_positive
from normfree.nn.matrix_form import prefers_matrix_form
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.standardization import EPS
from normfree.nn.symbolic import call_symbolically, is_symbolic


class ScaledWSLinear(ScaledWS, nn.Linear):  # type: ignore[misc]
    """Linear layer with scaled weight standardization: a 1×1 convolution of a vector; see `ScaledWSConv2d`.

    Input (…, in_features), output (…, out_features).
    """

    channel_axis = -1

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        in_scale: float = 1.0,
        out_scale: float = 1.0,
        skip_gain: float | None = None,
        eps: float = EPS,
        standardize: bool = True,
    ) -> None:
        """Make the layer; the arguments up to `dtype` are those of `torch.nn.Linear`.

        Args:
            in_features: Size of the input's last axis.
            out_features: Size of the output's last axis.
            bias: Whether the output has a learnable bias.
            device: Device of the parameters.
            dtype: Dtype of the parameters.
            in_scale: Factor that the input needs: the activation's γ times the block's β.
            out_scale: Factor that the output needs: the branch's α.
            skip_gain: Initial value of a learnable factor of the output (SkipInit); None for none.
            eps: Clamp on N · var(W).
            standardize: False leaves the filters as they are.

        Raises:
            ValueError: For sizes below 1, and for eps ≤ 0.
        """
        require_positive(in_features=in_features, out_features=out_features)
        super().__init__(
            in_features, out_features, bias, device, dtype,
            in_scale=in_scale, out_scale=out_scale, skip_gain=skip_gain, eps=eps, standardize=standardize,
        )  # fmt: skip

    @property
    def out_channels(self) -> int:  # type: ignore[override]
        """Number of output features."""
        return self.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the effective weight, and add the effective bias."""
        if is_symbolic(input):
            return call_symbolically(self, input)
        if self.written is not None:
            return self._as_written(input)
        if self._may_take_matrix_form(input) and prefers_matrix_form(self.weight, math.prod(input.shape[:-1])):
            out = self._apply_to_patches(input.reshape(-1, self.in_features))
            if out is not None:
                return out.view(*input.shape[:-1], self.out_features)
        return self._with_effective_parameters(input, lambda weight, bias: F.linear(input, weight, bias))
