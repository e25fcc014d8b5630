"""Residual blocks: pre-activation and post-activation, with what stands on their branches."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normfree import _torch
from normfree.nn.gates import EfficientChannelAttention, SqueezeExcite
from normfree.nn.recompute import recomputing_activation
from normfree.nn.scales import Scales
from normfree.nn.symbolic import is_symbolic

# No layer within these returns their output, so that none of its hooks can have it.
_MAKES_ITS_OUTPUT = (nn.modules.conv._ConvNd, nn.Linear, EfficientChannelAttention, SqueezeExcite)


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
        """Add the branch to the shortcut."""
        out, shortcut = x, x
        for index, (pre, conv) in enumerate(zip(self.pre, self.conv, strict=True)):
            if self.inner_gate is not None and index == len(self.conv) - 1:
                out = _owned_output(self.inner_gate, out)
            activated = pre(out)
            with recomputing_activation(activated, pre, out):
                if index == 0 and self.shortcut is not None:
                    shortcut = self.shortcut(activated)
                out = _owned_output(conv, activated)
        if self.gate is not None:
            out = _owned_output(self.gate, out)
        return _add_branch(shortcut, out, self.drop_rate if self.training else 0.0, self.rescale_drop)


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
        """Add the branch to the shortcut, and activate the sum."""
        if self.entry is not None:
            x = self.entry(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        branch = _owned_output(self.branch, x)
        return self.activation(_add_branch(shortcut, branch, self.drop_rate if self.training else 0.0))


def _owned_output(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x), which may be overwritten: a copy where somebody else may have it."""
    out = module(x)
    last = module
    while type(last) is nn.Sequential and len(last._modules) and not _is_hooked(last):
        last = next(reversed(last._modules.values()))
    return out if isinstance(last, _MAKES_ITS_OUTPUT) and not _is_hooked(last) else out.clone()


def _is_hooked(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooked) or _torch.has_global_hook()


def _add_branch(shortcut: Tensor, branch: Tensor, drop_rate: float, rescale: bool = False) -> Tensor:
    """Add shortcut and branch, leaving out an example's branch with probability `drop_rate`; overwrites the branch."""
    if drop_rate == 0 and is_symbolic(branch):
        return shortcut + branch
    if drop_rate == 0:
        return branch.add_(shortcut) if branch.dtype == shortcut.dtype else shortcut + branch
    keep = branch.new_empty((branch.shape[0], 1, 1, 1)).bernoulli_(1 - drop_rate)
    if rescale:
        keep /= 1 - drop_rate
    return torch.addcmul(shortcut, branch, keep)


class SkipInit(Scales):
    """Multiplication by a learnable scalar that starts at `skip_gain` (De & Smith 2020); any shape to the same."""

    skip_gain: nn.Parameter  # never None here

    def __init__(self, skip_gain: float = 0.0) -> None:
        super().__init__()
        self._register_scales(torch.empty(0), skip_gain=skip_gain)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.skip_gain.squeeze(0)  # a scalar takes the precision of x


class Bias(nn.Module):
    """Addition of one learnable number that starts at 0 (FixUp, Zhang et al. 2019); any shape to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return x + self.bias
