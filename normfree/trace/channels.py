"""Channel statistics of a tensor; pure functions."""

import torch
from torch import Tensor


def default_channel_axis(ndim: int) -> int:
    """Guess the channel axis where the dataflow does not say: (N, C), (N, L, C), (N, C, H, W), (N, C, D, H, W)."""
    return 2 if ndim == 3 else min(1, ndim - 1)


def has_statistics(x: Tensor) -> bool:
    """Tell whether a tensor has channel statistics: dense, of real numbers, one of them and one axis at least."""
    return x.is_floating_point() and x.ndim > 0 and x.numel() > 0 and x.layout == torch.strided


def channel_statistics(x: Tensor, channel_axis: int | None = None) -> Tensor:
    """Compute (average channel squared mean, average channel variance) of x, a float64 tensor of 2 on x's device.

    With x of shape (N, C, H, W): the mean over c of (mean over n, h, w of x)², and the mean over c of the biased
    variance over n, h, w (Brock et al. 2021, section 3). Any other shape works alike, channels at `channel_axis`.

    No temporary of x's size is made, except for half precision, which is reduced in float32.
    """
    mean, variance = channel_moments(x, channel_axis)
    return torch.stack([mean.square().mean(), variance.mean()])


def channel_zeros(x: Tensor, channel_axis: int | None = None) -> Tensor:
    """Compute (fraction of zeros, fraction of channels that are zero everywhere) of x, a float64 tensor of 2."""
    axis = default_channel_axis(x.ndim) if channel_axis is None else channel_axis
    others = [d for d in range(x.ndim) if d != axis]
    # An empty list of axes means all of them.
    alive = torch.count_nonzero(x.detach(), others).double() if others else (x.detach() != 0).double()
    return torch.stack([1 - alive.sum() / x.numel(), (alive == 0).double().mean()])


def channel_moments(x: Tensor, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance of each channel, two float64 tensors of (C,), as `channel_statistics` does."""
    axis = default_channel_axis(x.ndim) if channel_axis is None else channel_axis
    x = x.detach()
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if x.ndim == 1:
        x = x[None]
        axis += 1
    # Channels last are seen as one image of width 1 in channels_last layout: a single pass for the kernel below.
    last = axis == x.ndim - 1
    x = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2) if last else x.movedim(axis, 1)
    if x.device.type in ("cpu", "cuda"):
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
    return (mean, variance) if x.device.type == "mps" else (mean.double(), variance.double())
