"""Gains: γ of an activation, the factor that gives g(z), z ~ N(0, 1), unit variance."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Activation = str | Callable[[Tensor], Tensor]
GainSource = Literal["exact", "reference"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "log_sigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "soft_sign": nn.Softsign,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
}
"""Activations by name. "gelu" is the exact (erf) one; the authors' code uses the tanh approximation, "gelu_tanh"."""

# The constants of the authors' code (deepmind-research, nfnets/base.py): Monte-Carlo estimates, up to 1.2e-3 off.
_REFERENCE = {
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "gelu_tanh": 1.7015043497085571,
    "glu": 1.8484294414520264,
    "identity": 1.0,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "log_softmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}
_ALIASES = {"swish": "silu", "logsigmoid": "log_sigmoid", "softsign": "soft_sign", "leakyrelu": "leaky_relu"}
_NAMES = {name.replace("_", ""): name for name in (*ACTIVATIONS, *_REFERENCE)} | _ALIASES


def make_activation(name: str) -> nn.Module:
    """A new module of the activation called `name` (a key of `ACTIVATIONS`, or an alias such as "swish").

    Raises ValueError for a name that is not known.
    """
    factory = ACTIVATIONS.get(_canonical(name)) if isinstance(name, str) else None
    if factory is None:
        raise ValueError(f"activation {name!r} is not known; the names are {', '.join(ACTIVATIONS)}")
    return factory()


def gain(activation: Activation, *, source: GainSource = "exact") -> float:
    """Compute γ = 1/√Var[g(z)], z ~ N(0, 1), of an elementwise activation g (Brock et al. 2021, section 4.2).

    Args:
        activation: A name (see `ACTIVATIONS`), a function of a tensor, or a module.
        source: "exact": adaptive Gauss–Legendre quadrature in float64, relative error at most 1e-10 for smooth
            functions and 1e-8 for those with kinks or jumps; "reference": the constant of the authors' code.

    Returns:
        γ.

    Raises:
        ValueError: For a name that is not known, for a function that is not elementwise or is random, for one whose
            variance is not finite or not positive, and where no reference constant exists.
    """
    if source not in ("exact", "reference"):
        raise ValueError(f"source is {source!r}; it must be 'exact' or 'reference'")
    if source == "reference":
        return _reference_gain(activation)
    if isinstance(activation, str):
        return _named_gain(_canonical(activation))
    return _quadrature_gain(activation, _describe(activation))


@functools.cache
def _named_gain(name: str) -> float:
    return _quadrature_gain(make_activation(name), repr(name))


def _reference_gain(activation: Activation) -> float:
    name = _canonical(_describe(activation))
    constant = _REFERENCE.get(name)
    if constant is None:
        raise ValueError(
            f"the authors' code has no gain for {_describe(activation)}; it has {', '.join(_REFERENCE)}. "
            "Use source='exact'."
        )
    # A parametrized module may carry the name of another function: LeakyReLU(0.2) is not the reference's.
    if not isinstance(activation, str) and abs(gain(activation) / constant - 1) > 2e-3:
        raise ValueError(
            f"{_describe(activation)} is not the function whose reference gain is {constant}: its own is "
            f"{gain(activation):.6f}. Use source='exact'."
        )
    return constant


def _canonical(name: str) -> str:
    key = name.strip().lower().split("(")[0].replace("_", "").replace("-", "")
    return _NAMES.get(key, name)


def _describe(activation: Activation) -> str:
    if isinstance(activation, str):
        return activation
    if isinstance(activation, nn.Module):
        return type(activation).__name__
    return getattr(activation, "__name__", repr(activation))


def _quadrature_gain(activation: Callable[[Tensor], Tensor], name: str) -> float:
    if not callable(activation):
        raise ValueError(f"activation is {activation!r}; give a name, a function of a tensor, or a module")
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation).cpu().double().eval()
    with torch.no_grad(), torch.device("cpu"):  # whatever device the caller builds a network on
        _require_elementwise(activation, name)
        mean, _ = _integrate(activation, name)
        variance, tail = _integrate(lambda z: (activation(z).to(z.dtype) - mean) ** 2, name)
    if tail > 1e-12 * variance:
        raise ValueError(f"{name} grows too fast: it has no finite variance under N(0, 1)")
    if variance <= 1e-24 * mean**2 or variance <= 0:
        raise ValueError(
            f"{name} is constant, or all but constant (variance {variance:g} under N(0, 1)): no gain makes that 1"
        )
    return 1 / math.sqrt(variance)


def _require_elementwise(function: Callable[[Tensor], Tensor], name: str) -> None:
    z = torch.linspace(-3.7, 4.1, 64, dtype=torch.float64)
    try:
        out = function(z.clone())
        elementwise = (
            out.shape == z.shape
            and out.equal(function(z.clone()))
            and out.flip(0).equal(function(z.flip(0).clone()))
            and _equal(out[:7], function(z[:7].clone()))
            and _equal(out.view(8, 8), function(z.view(8, 8).clone()))
        )
    except Exception as error:
        raise ValueError(f"{name} is not an elementwise function of a float64 tensor: {error}") from error
    if not elementwise and not bool(torch.isnan(out).any()):
        raise ValueError(f"{name} is not elementwise (or it is random): g(x)[i] must depend on x[i] alone")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-12, atol=0, equal_nan=True)


_MOST_PANELS = 2**18
_LIMIT = 38.0  # the density of N(0, 1) underflows in float64 beyond it


@functools.cache
def _gauss_legendre(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], from the eigenvectors of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, order, dtype=torch.float64)
    off_diagonal = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, 2 * vectors[0] ** 2


def _integrate(function: Callable[[Tensor], Tensor], name: str) -> tuple[float, float]:
    """Integrate g(z) φ(z) over the line; also return the part that comes from the outermost panels.

    Panels that disagree with their two halves are split until they agree, so kinks and jumps may lie anywhere.
    """
    nodes, weights = _gauss_legendre(20)

    def panels(left: Tensor, right: Tensor) -> Tensor:
        half = (right - left) / 2
        z = (left + half)[:, None] + half[:, None] * nodes
        # A copy, since an activation may work in place; float64, since it may return truth values.
        value = function(z.flatten().clone()).to(z.dtype).view_as(z)
        if not bool(torch.isfinite(value).all()):
            where = z[~torch.isfinite(value)].abs().min().item()
            raise ValueError(f"{name} is not finite at |z| = {where:.3g}: it has no finite variance under N(0, 1)")
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        return (value * density * weights).sum(1) * half

    edges = torch.linspace(-_LIMIT, _LIMIT, 8 * int(_LIMIT) + 1, dtype=torch.float64)
    left, right = edges[:-1], edges[1:]
    areas = panels(left, right)
    tail = float(areas[:4].abs().sum() + areas[-4:].abs().sum())
    total, scale = 0.0, float(areas.abs().sum())
    for _ in range(60):
        middle = (left + right) / 2
        low, high = panels(left, middle), panels(middle, right)
        agree = (areas - low - high).abs() <= 1e-15 * scale
        total += float((low + high)[agree].sum())
        left, right = torch.cat([left[~agree], middle[~agree]]), torch.cat([middle[~agree], right[~agree]])
        areas = torch.cat([low[~agree], high[~agree]])
        if not len(left) or len(left) > _MOST_PANELS:
            break
    rest = float(areas.abs().sum())
    if len(left) > _MOST_PANELS or rest > 1e-8 * (abs(total) + rest):
        raise ValueError(
            f"{name} has no finite variance under N(0, 1), or none that is found: its integral does not settle near "
            f"z = {left[areas.abs().argmax()]:.3g}"
        )
    return total + float(areas.sum()), tail
