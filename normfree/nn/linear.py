"""The linear layer with scaled standardized weights."""

import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.scaled_layer import SCALES_DOC, ScaledWS


class ScaledWSLinear(ScaledWS, nn.Linear):  # type: ignore[misc]
    __doc__ = f"""Linear layer with scaled weight standardization: a 1×1 convolution of a vector.

    Input (…, in_features), output (…, out_features); all arguments of `torch.nn.Linear`, and

    {SCALES_DOC}
    """

    channel_axis = -1

    @property
    def out_channels(self) -> int:  # type: ignore[override]
        """`out_features`."""
        return self.out_features

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.effective_parameters())
