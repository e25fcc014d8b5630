"""Moments: mean, variance and third moment of every entry of an activation, over random inputs, and its law.

An entry is a function of a normal variable: value = function(mu + std · z), z ~ N(0, 1). Pointwise operations compose
that function, so what they give is exact but for the quadrature; sums of many independent entries start anew from a
normal law, sums of two from a law of their three moments.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

Pointwise = Callable[[Tensor], Tensor]

# A trapezoidal rule: for smooth functions it converges faster than any power, at kinks it errs by 1e-3.
_NODES = torch.linspace(-5.0, 5.0, 41, dtype=torch.float64)
_WEIGHTS = torch.exp(-_NODES.square() / 2) / torch.exp(-_NODES.square() / 2).sum()


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of each entry of an activation, of its shape, and its law.

    Attributes:
        mean: Mean of each entry.
        variance: Variance of each entry.
        third: Third central moment of each entry.
        mu: Mean of the normal variable that an entry is a function of.
        std: Its standard deviation.
        function: The function; None for the identity.
        base: Identity of that variable: what has the same base depends on the same values, entry by entry.
    """

    mean: Tensor
    variance: Tensor
    third: Tensor
    mu: Tensor
    std: Tensor
    function: Pointwise | None = None
    base: object = field(default_factory=object)

    @property
    def shape(self) -> torch.Size:
        """Shape of the activation."""
        return self.mean.shape

    def apply(self, x: Tensor) -> Tensor:
        """Apply the function to values of the normal variable."""
        return x if self.function is None else self.function(x)


def normal(mean: Tensor, variance: Tensor) -> Moments:
    """Make independent normal entries."""
    variance = variance.clamp_min(0)
    return Moments(mean, variance, torch.zeros_like(mean), mean, variance.sqrt())


def skewed(mean: Tensor, variance: Tensor, third: Tensor) -> Moments:
    """Make independent entries of three moments: a quadratic in a normal variable (Cornish and Fisher 1938)."""
    if not bool(third.any()):
        return normal(mean, variance)
    variance = variance.clamp_min(0)
    skewness = (third / (variance * variance.sqrt()).clamp_min(1e-30)).clamp(-2, 2)
    scale = (variance / (1 + skewness.square() / 18)).sqrt()

    def function(x: Tensor) -> Tensor:
        return mean + scale * (x + skewness / 6 * (x.square() - 1))

    return Moments(mean, variance, third, torch.zeros_like(mean), torch.ones_like(mean), function)


def pointwise(m: Moments, function: Pointwise) -> Moments:
    """Return the moments of function(x), by quadrature over the normal variable."""
    return _integrated(m, lambda x: function(m.apply(x)))


def combined(m: Moments, n: Moments, function: Callable[[Tensor, Tensor], Tensor]) -> Moments:
    """Return the moments of function(x, y) for two functions of the same variable."""
    return _integrated(m, lambda x: function(m.apply(x), n.apply(x)))


def _integrated(m: Moments, function: Pointwise) -> Moments:
    center = function(m.mu)
    first, second, third = (torch.zeros_like(center) for _ in range(3))
    for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
        value = function(m.mu + m.std * node) - center
        square = value.square()
        first += weight * value
        second += weight * square
        third += weight * square * value
    third -= 3 * first * second - 2 * first**3
    return Moments(center + first, (second - first.square()).clamp_min(0), third, m.mu, m.std, function, m.base)


def rectified(m: Moments) -> Moments:
    """Return the moments of max(x, 0); in closed form for a normal x."""
    if m.function is not None:
        return pointwise(m, torch.relu)
    mu, std = m.mu, m.std.clamp_min(1e-30)
    ratio = (mu / std).clamp(-30, 30)
    above = torch.special.ndtr(ratio)
    density = std * torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    square = std.square()
    mean = mu * above + density
    second = (mu.square() + square) * above + mu * density
    cube = (mu**3 + 3 * mu * square) * above + (mu.square() + 2 * square) * density
    third = cube - 3 * mean * second + 2 * mean**3
    return Moments(mean, (second - mean.square()).clamp_min(0), third, m.mu, m.std, torch.relu, m.base)


def affine(m: Moments, scale: Tensor | float, shift: Tensor | float = 0.0) -> Moments:
    """Return the moments of scale · x + shift, of a shape that both may broadcast."""
    mean = m.mean * scale + shift
    zero = torch.zeros_like(mean)
    variance, third = m.variance * scale**2 + zero, m.third * scale**3 + zero
    return Moments(mean, variance, third, m.mu + zero, m.std + zero, lambda x: m.apply(x) * scale + shift, m.base)


def added(m: Moments, n: Moments, factor: float = 1.0) -> Moments:
    """Return the moments of x + factor · y, exact for functions of the same variable, else of independent ones."""
    if m.base is n.base:
        return combined(m, n, lambda x, y: x + factor * y)
    third = m.third + factor**3 * n.third
    return skewed(m.mean + factor * n.mean, m.variance + factor**2 * n.variance, third)


def multiplied(m: Moments, n: Moments) -> Moments:
    """Return the moments of x · y, exact for functions of the same variable, else of independent ones."""
    if m.base is n.base:
        return combined(m, n, torch.mul)
    variance = m.variance * n.variance + m.mean.square() * n.variance + n.mean.square() * m.variance
    return normal(m.mean * n.mean, variance)


def joined(parts: list[Moments], dim: int) -> Moments:
    """Concatenate; each part keeps its function."""
    sizes = [part.shape[dim] for part in parts]

    def function(x: Tensor) -> Tensor:
        pieces = x.split(sizes, dim)
        return torch.cat([part.apply(piece) for part, piece in zip(parts, pieces, strict=True)], dim)

    def together(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim)

    plain = all(part.function is None for part in parts)
    mean, variance, third, mu, std = map(together, ("mean", "variance", "third", "mu", "std"))
    return Moments(mean, variance, third, mu, std, None if plain else function)


def rearranged(m: Moments, move: Callable[[Tensor], Tensor]) -> Moments:
    """Return the moments of entries that are moved, copied or left out."""
    return skewed(move(m.mean), move(m.variance), move(m.third))


def normalized(m: Moments, axes: list[int], eps: float) -> Moments:
    """Subtract the mean over the axes and divide by the standard deviation there, as in a large sample."""
    mean = m.mean.mean(axes, keepdim=True)
    variance = m.variance.mean(axes, keepdim=True) + (m.mean - mean).square().mean(axes, keepdim=True)
    scale = (variance + eps).rsqrt()
    return affine(m, scale, -mean * scale)


def largest(m: Moments, log_sum: Callable[[Tensor], Tensor]) -> Moments:
    """Return the moments of the largest of independent entries; `log_sum` adds up logarithms over a window.

    The largest of increasing functions is the function of the largest, whose distribution is the product of those of
    the normal variables.
    """
    axes = [d for d in range(m.mu.ndim) if d != 1]
    center = m.mu.mean(axes, keepdim=True)
    spread = (m.std.square().mean(axes, keepdim=True) + (m.mu - center).square().mean(axes, keepdim=True)).sqrt()
    points = [center + spread * node for node in (_NODES * 1.2).tolist()]
    values = [m.apply(point) for point in points]
    rising = all(v.shape == center.shape for v in values) and all(bool((b >= a).all()) for a, b in pairwise(values))
    if not rising:
        return largest(normal(m.mean, m.variance), log_sum)
    std = m.std.clamp_min(1e-30)
    below = [torch.exp(log_sum(torch.special.log_ndtr((point - m.mu) / std))) for point in points]
    below[-1] = torch.ones_like(below[-1])
    half = float(_NODES[1] - _NODES[0]) * 1.2 / 2
    first = below[0] * values[0]
    second = below[0] * values[0].square()
    for point, (before, until) in zip(points[1:], pairwise(below), strict=True):
        middle = m.apply(point - spread * half)
        first = first + (until - before) * middle
        second = second + (until - before) * middle.square()
    return _shaped(first, (second - first.square()).clamp_min(0), values, [float(b.mean()) for b in below], axes)


def _shaped(mean: Tensor, variance: Tensor, values: list[Tensor], below: list[float], axes: list[int]) -> Moments:
    """Make entries whose law is one for all channels but for mean and variance: P(x <= values[i]) = below[i]."""
    center, std = mean.mean(axes, keepdim=True), variance.mean(axes, keepdim=True).sqrt().clamp_min(1e-30)
    at = torch.special.ndtri(torch.tensor(below, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)).to(mean)
    shape = torch.stack([((value - center) / std).mean() for value in values])
    rises = torch.cat([at.new_ones(1, dtype=torch.bool), at.diff() > 1e-6])
    at, shape = at[rises], shape[rises]
    if len(at) < 2:
        return normal(mean, variance)
    scale = variance.sqrt()

    def function(x: Tensor) -> Tensor:
        right = torch.bucketize(x, at).clamp(1, len(at) - 1)
        share = (x - at[right - 1]) / (at[right] - at[right - 1])
        return mean + scale * torch.lerp(shape[right - 1], shape[right], share)

    law = Moments(mean, variance, torch.zeros_like(mean), torch.zeros_like(mean), torch.ones_like(mean), function)
    return Moments(mean, variance, _integrated(law, function).third, law.mu, law.std, function)
