"""What residual networks are made of besides convolutions: the block, squeeze-excite, stochastic depth, pooling."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.conv import both_sides, same_padding
from normfree.nn.recompute import recomputing_activation
from normfree.nn.scales import Scales


class _Gate(Scales):
    """Multiplies each channel by gate_scale · out_scale · skip_gain · sigmoid(what its mean over H, W leads to).

    (N, C, H, W) to the same. `out_scale` and `skip_gain` are the branch's α and SkipInit gain: at the end of a branch
    they are applied here, to (N, C, 1, 1) numbers, rather than to the activations. `gate_scale` is 2 in
    normalizer-free networks, where the gate's expected value of ½ would otherwise shrink the branch (Brock et al. 2021,
    section 4.3), and 1 elsewhere.
    """

    def __init__(self, gate_scale: float, out_scale: float, skip_gain: float | None) -> None:
        super().__init__()
        self.gate_scale = gate_scale
        self._register_scales(torch.empty(0), out_scale=out_scale, skip_gain=skip_gain)
        self.reset_scales()

    def _logits(self, means: Tensor) -> Tensor:
        """(N, C) to the same."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gate_scale * self._out_scale()
        gate = torch.sigmoid(self._logits(x.mean((2, 3))))
        return x * (gate * scale.to(gate.dtype))[:, :, None, None]


class SqueezeExcite(_Gate):
    __doc__ = f"""Squeeze-excite, over fc1(relu(fc0(means))) with a layer of `hidden` between them.

    {_Gate.__doc__}"""

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        gate_scale: float = 1.0,
        out_scale: float = 1.0,
        skip_gain: float | None = None,
    ) -> None:
        super().__init__(gate_scale, out_scale, skip_gain)
        self.fc0 = nn.Linear(channels, hidden)
        self.fc1 = nn.Linear(hidden, channels)
        for layer in (self.fc0, self.fc1):
            init_truncated_normal(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def of_ratio(cls, channels: int, ratio: float, **scales: Any) -> "SqueezeExcite":
        """With the authors' hidden width, max(1, int(channels · ratio))."""
        return cls(channels, max(1, int(channels * ratio)), **scales)

    def _logits(self, means: Tensor) -> Tensor:
        return self.fc1(F.relu(self.fc0(means)))


class EfficientChannelAttention(_Gate):
    __doc__ = f"""ECA (Wang et al. 2020), over a convolution of `kernel_size` along the channels.

    {_Gate.__doc__}"""

    def __init__(
        self, kernel_size: int, *, gate_scale: float = 1.0, out_scale: float = 1.0, skip_gain: float | None = None
    ) -> None:
        super().__init__(gate_scale, out_scale, skip_gain)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def _logits(self, means: Tensor) -> Tensor:
        return self.conv(means[:, None])[:, 0]


class PreActivationBlock(nn.Module):
    """The pre-activation residual block, with or without normalization: all that differs is in its parts.

    (N, C, H, W) to (N, C', H / stride, W / stride). `pre[i]` comes before `conv[i]`: an activation, or a normalizer and
    an activation in either order. `shortcut` is a projection of `pre[0]`'s output, or None for the identity, which
    takes the input as it is. Squeeze-excite comes after the last convolution (`gate`) or before the last `pre`
    (`inner_gate`).

    In training each example's branch is dropped with probability `drop_rate` (stochastic depth; as in the authors'
    code what survives is not rescaled, unless `rescale_drop`). `expected_variance` is the ledger's entry for the
    output, for whoever wants to compare; None where there is none.

    Activations between convolutions that work in place, and the addition, overwrite the output of the convolution
    before them, which nobody else has, unless that convolution has hooks.
    """

    def __init__(
        self,
        *,
        pre: Sequence[nn.Module],
        conv: Sequence[nn.Module],
        shortcut: nn.Module | None,
        gate: nn.Module | None = None,
        inner_gate: nn.Module | None = None,
        drop_rate: float = 0.0,
        rescale_drop: bool = False,
        expected_variance: float | None = None,
    ) -> None:
        super().__init__()
        self.pre = nn.ModuleList(pre)
        self.conv = nn.ModuleList(conv)
        self.shortcut = shortcut
        self.gate = gate
        self.inner_gate = inner_gate
        self.drop_rate = drop_rate
        self.rescale_drop = rescale_drop
        self.expected_variance = expected_variance

    def forward(self, x: Tensor) -> Tensor:
        out, shortcut = x, x
        for index, (pre, conv) in enumerate(zip(self.pre, self.conv, strict=True)):
            if self.inner_gate is not None and index == len(self.conv) - 1:
                out = _own(self.inner_gate, out)
            activated = pre(out)
            with recomputing_activation(activated, pre, out):
                if index == 0 and self.shortcut is not None:
                    shortcut = self.shortcut(activated)
                out = _own(conv, activated)
        if self.gate is not None:
            out = _own(self.gate, out)
        return _join(shortcut, out, self.drop_rate if self.training else 0.0, self.rescale_drop)


class PostActivationBlock(nn.Module):
    """The original residual block: activation(shortcut(entry(x)) + branch(entry(x))).

    (N, C, H, W) to (N, C', H / stride, W / stride). `branch` holds the convolutions and all that is between them,
    `shortcut` a projection, or is None for the identity; `entry` comes before both, if given. Stochastic depth as in
    `PreActivationBlock`.
    """

    def __init__(
        self,
        *,
        branch: nn.Module,
        shortcut: nn.Module | None,
        activation: nn.Module,
        entry: nn.Module | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.entry = entry
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        if self.entry is not None:
            x = self.entry(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        branch = _own(self.branch, x)
        return self.activation(_join(shortcut, branch, self.drop_rate if self.training else 0.0))


def _own(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), which may be overwritten: a copy where hooks have seen the module's output."""
    out = module(x)
    hooked = nn.modules.module._has_any_global_hook() or any(
        m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()
    )
    return out.clone() if hooked else out


def _join(shortcut: Tensor, branch: Tensor, drop_rate: float, rescale: bool = False) -> Tensor:
    """shortcut + branch, the branch of each example left out with probability `drop_rate`; overwrites the branch."""
    if drop_rate == 0:
        return branch.add_(shortcut) if branch.dtype == shortcut.dtype else shortcut + branch
    keep = branch.new_empty(len(branch), 1, 1, 1).bernoulli_(1 - drop_rate)
    if rescale:
        keep /= 1 - drop_rate
    return torch.addcmul(shortcut, branch, keep)


class SkipInit(Scales):
    """x times a learnable scalar that starts at `skip_gain` (De & Smith 2020); any shape to the same."""

    skip_gain: nn.Parameter  # never None here

    def __init__(self, skip_gain: float = 0.0) -> None:
        super().__init__()
        self._register_scales(torch.empty(0), skip_gain=skip_gain)
        self.reset_scales()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.skip_gain.squeeze(0)  # a scalar takes the precision of x


class Bias(nn.Module):
    """x plus one learnable number that starts at 0 (FixUp, Zhang et al. 2019); any shape to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class AveragePool2d(nn.Module):
    """2×2 average pooling with stride 2; at odd sizes the last windows average what is there (SAME).

    (N, C, H, W) to (N, C, ⌈H/2⌉, ⌈W/2⌉).
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            # The same average, from a repeated last row or column: sizes may be symbols, of which ceil_mode asks more.
            height, width = (same_padding(size, 2, 2) for size in x.shape[-2:])
            return F.avg_pool2d(F.pad(x, (0, width, 0, height), "replicate"), 2, 2)
        return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)


class MaxPool2d(nn.Module):
    """3×3 max pooling with stride 2. padding="same" as in TensorFlow and JAX, "symmetric" pads 1 on every side."""

    def __init__(self, padding: str = "same") -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == "symmetric":
            return F.max_pool2d(x, 3, 2, padding=1)
        total = [same_padding(size, 3, 2) for size in x.shape[-2:]]
        if torch.compiler.is_exporting() or len({t % 2 for t in total}) > 1:
            # In an export the sizes may be symbols, whose parity nobody knows.
            pads = [side for t in reversed(total) for side in both_sides(t)]
            return F.max_pool2d(F.pad(x, pads, value=float("-inf")), 3, 2)
        # A window that hangs over the end (ceil_mode) is the odd padding element of SAME.
        return F.max_pool2d(x, 3, 2, padding=[t // 2 for t in total], ceil_mode=True)

    def extra_repr(self) -> str:
        return f"padding={self.padding!r}"


def init_truncated_normal(weight: Tensor) -> None:
    """Haiku's default: a normal of variance 1/fan_in, cut at two standard deviations (which leaves 0.774/fan_in)."""
    std = weight[0].numel() ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
