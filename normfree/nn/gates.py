"""Gates of whole channels: squeeze-excite and efficient channel attention.

`out_scale` and `skip_gain` are the branch's α and SkipInit gain: at the end of a branch they are applied here, to
(N, C, 1, 1) numbers, rather than to the activations. `gate_scale` is 2 in normalizer-free networks, where the gate's
expected value of ½ would otherwise shrink the branch (Brock et al. 2021, section 4.3), and 1 elsewhere.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.arguments import checked, require_moderate, require_positive
from normfree.nn.initialization import truncated_normal_
from normfree.nn.scales import Scales


class Gate(Scales):
    """Each channel times gate_scale · out_scale · skip_gain · sigmoid(logits), (N, C, H, W) to the same."""

    def __init__(self, gate_scale: float, out_scale: float, skip_gain: float | None) -> None:
        require_moderate(gate_scale=gate_scale)
        super().__init__()
        self.gate_scale = gate_scale
        self._register_scales(torch.empty(0), out_scale=out_scale, skip_gain=skip_gain)

    def _logits(self, means: Tensor) -> Tensor:
        """Return what the sigmoid is taken of, (N, C), from the channels' means, (N, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Gate x."""
        scale = self.gate_scale * self._out_scale()
        gate = torch.sigmoid(self._logits(x.mean((2, 3))))
        return x * (gate * scale.to(gate.dtype))[:, :, None, None]


class SqueezeExcite(Gate):
    """Squeeze-excite: each channel times gate_scale · out_scale · skip_gain · sigmoid(fc1(relu(fc0(means over H, W)))).

    Input and output (N, C, H, W); `hidden` is the width between the two layers. See `normfree.nn.gates` for the scales.
    """

    @checked
    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        gate_scale: float = 1.0,
        out_scale: float = 1.0,
        skip_gain: float | None = None,
    ) -> None:
        require_positive(channels=channels, hidden=hidden)
        super().__init__(gate_scale, out_scale, skip_gain)
        self.fc0 = nn.Linear(channels, hidden)
        self.fc1 = nn.Linear(hidden, channels)
        for layer in (self.fc0, self.fc1):
            truncated_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def of_ratio(cls, channels: int, ratio: float, **scales: Any) -> "SqueezeExcite":
        """Make one with the authors' hidden width, max(1, int(channels · ratio))."""
        return cls(channels, max(1, int(channels * ratio)), **scales)

    def _logits(self, means: Tensor) -> Tensor:
        return self.fc1(F.relu(self.fc0(means)))


class EfficientChannelAttention(Gate):
    """ECA (Wang et al. 2020): a gate from a convolution of `kernel_size` along the means of the channels over H, W.

    Input and output (N, C, H, W), scales as those of `SqueezeExcite`.
    """

    @checked
    def __init__(
        self, kernel_size: int, *, gate_scale: float = 1.0, out_scale: float = 1.0, skip_gain: float | None = None
    ) -> None:
        require_positive(kernel_size=kernel_size)
        super().__init__(gate_scale, out_scale, skip_gain)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def _logits(self, means: Tensor) -> Tensor:
        return self.conv(means[:, None])[:, 0]
