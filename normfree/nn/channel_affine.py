"""The affine map per channel that a normalizer with running statistics is in eval mode."""

import torch
from torch import Tensor, nn


class ChannelAffine(nn.Module):
    """Multiplication and addition per channel, (N, C, …) to the same: y = weight · scale · (x − center) + bias.

    It stands where no layer can carry what a normalizer does in eval mode: after an activation or a concatenation, or
    on the network's input. It depends on no batch. `weight` and `bias`, (C,), are learnable, at the rates that suited
    the normalizer's; `scale` and `center`, (C,), are constants.
    """

    scale: Tensor
    center: Tensor

    def __init__(
        self, channels: int, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("scale", torch.ones(channels, device=device, dtype=dtype))
        self.register_buffer("center", torch.zeros(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Make it the identity: statistics of what came from old weights are forgotten, as BatchNorm's are."""
        with torch.no_grad():
            for ones in (self.weight, self.scale):
                ones.fill_(1)
            for zeros in (self.bias, self.center):
                zeros.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add."""
        shape = [-1] + [1] * (x.dim() - 2)
        slope = self.weight * self.scale
        shift = self.bias - slope * self.center
        return torch.addcmul(shift.to(x.dtype).view(shape), x, slope.to(x.dtype).view(shape))

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return str(self.channels)
