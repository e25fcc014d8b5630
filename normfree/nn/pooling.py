"""Poolings of the authors' networks, padded as TensorFlow and JAX do."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree._torch import is_scripting, is_tracing
from normfree.nn.padding import pad_both_sides, padded_in_script, same_padding
from normfree.nn.symbolic import call_symbolically, is_symbolic


class AveragePool2d(nn.Module):
    """Average pooling, 2×2 with stride 2, or 1; the last windows average what is there (SAME).

    (N, C, H, W) to (N, C, ⌈H/stride⌉, ⌈W/stride⌉).
    """

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Pool x."""
        if self.stride == 1:
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), "replicate"), 2, 1)
        if is_scripting():
            return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        else:
            return self._pool(x)

    def _pool(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            # The same average, from a repeated last row or column: sizes may be symbols, of which ceil_mode asks more.
            height, width = (same_padding(size, 2, 2) for size in x.shape[-2:])
            return F.avg_pool2d(F.pad(x, (0, width, 0, height), "replicate"), 2, 2)
        return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)


class MaxPool2d(nn.Module):
    """Max pooling, 3×3 with stride 2: padding="same" as in TensorFlow and JAX, "symmetric" pads 1 on every side."""

    def __init__(self, padding: str = "same") -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Pool x, (N, C, H, W) to (N, C, ⌈H/2⌉, ⌈W/2⌉)."""
        if self.padding == "symmetric":
            return F.max_pool2d(x, 3, 2, padding=1)
        if is_scripting():
            return F.max_pool2d(padded_in_script(x, [3, 3], [2, 2], [1, 1], "constant", float("-inf")), 3, 2)
        else:
            return self._pool(x)

    def _pool(self, x: Tensor) -> Tensor:
        if is_symbolic(x):
            symbolic: Tensor = call_symbolically(self, x)
            return symbolic
        if is_tracing():
            return F.max_pool2d(padded_in_script(x, [3, 3], [2, 2], [1, 1], "constant", float("-inf")), 3, 2)
        totals = [same_padding(size, 3, 2) for size in x.shape[-2:]]
        if torch.compiler.is_exporting() or len({t % 2 for t in totals}) > 1:
            # In an export the sizes may be symbols, whose parity nobody knows.
            return F.max_pool2d(F.pad(x, pad_both_sides(totals), value=float("-inf")), 3, 2)
        # A window that hangs over the end (ceil_mode) is the odd padding element of SAME.
        return F.max_pool2d(x, 3, 2, padding=[t // 2 for t in totals], ceil_mode=True)

    def extra_repr(self) -> str:
        """Show the padding."""
        return f"padding={self.padding!r}"
