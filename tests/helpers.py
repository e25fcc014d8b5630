"""Helpers of several tests: the authors' numbers, and comparisons that print what differs."""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from normfree.models import create_model
from normfree.models.haiku import load_haiku
from tests.fixtures.recipe import make_input, make_param

FIXTURES = Path(__file__).parent / "fixtures"
SEEDS = st.integers(0, 2**32 - 1)
"""Seeds of the tensors of a property test: what it draws can be drawn again."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def reference_json(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text())


@functools.cache
def reference_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name) as arrays:
        return dict(arrays)


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "value") -> None:
    """max|difference| ≤ tolerance · max(1, max|expected|), the rule of the reference."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    difference = float(np.abs(actual - expected).max()) if actual.size else 0.0
    bound = tolerance * max(1.0, float(np.abs(expected).max()) if expected.size else 0.0)
    assert difference <= bound, f"{what}: differs by {difference:.3g}, more than {bound:.3g}, shape {actual.shape}"


def assert_equal(actual: Tensor, expected: Tensor, what: str = "value") -> None:
    """Bit for bit, of one shape and dtype."""
    found, wanted = ((tuple(tensor.shape), tensor.dtype) for tensor in (actual, expected))
    assert found == wanted, f"{what} is of {found}, expected {wanted}"
    if torch.equal(actual, expected):
        return
    apart = (actual != expected).flatten()
    first = int(apart.nonzero()[0])
    one, other = (tensor.detach().flatten()[first].item() for tensor in (actual, expected))
    pytest.fail(f"{what}: {int(apart.sum())} of {found[0]} differ, the first, number {first}, is {one}, not {other}")


def assert_allclose(
    actual: Tensor, expected: Tensor, *, rtol: float = 1e-5, atol: float = 1e-8, what: str = "value"
) -> None:
    """The rule and the tolerances of torch.allclose, for tensors of one shape and dtype."""
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, msg=lambda said: f"{what}, shape {tuple(expected.shape)}: {said}"
    )


def assert_same_state(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and under each the same tensor, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal(actual[name], value, name)


def assert_gradients(model: nn.Module) -> None:
    """Every parameter has a gradient, and it is finite."""
    parameters = dict(model.named_parameters())
    assert parameters
    bad = {
        name: "none" if p.grad is None else f"{int((~p.grad.isfinite()).sum())} of {tuple(p.shape)} not finite"
        for name, p in parameters.items()
        if p.grad is None or not p.grad.isfinite().all()
    }
    assert not bad, f"gradients of {len(bad)} of {len(parameters)} parameters: {bad}"


def reference_network(case: str, name: str, dtype: torch.dtype, **arguments: Any) -> tuple[nn.Module, torch.Tensor]:
    """The network of a `forward_<case>.npz` with the recipe's parameters, and its input."""
    arrays = reference_arrays(f"forward_{case}.npz")
    meta, shapes = (json.loads(str(arrays[key])) for key in ("meta", "shapes"))
    arguments |= {"drop_rate": 0.0, "stochastic_depth_rate": 0.0}
    model = create_model(name, width=meta["width"], num_classes=10, dtype=dtype, **arguments)
    load_haiku(model, {key: make_param(key, shape) for key, shape in shapes.items()})
    # In channels_last torch's BatchNorm sums in float32, by as many parts as there are threads.
    return model.train(meta["is_training"]), nchw(make_input(meta["input_shape"])).to(dtype).contiguous()


class BlockStatistics(NamedTuple):
    squared_mean: float
    variance: float


def watch_blocks(model: nn.Module) -> tuple[list[BlockStatistics], list[Any]]:
    """A list that the statistics of every block's output are added to when the model runs, and the hooks that do it."""
    rows: list[BlockStatistics] = []

    def record(module, inputs, output):
        mean, variance = output.mean((0, 2, 3)), output.var((0, 2, 3), correction=0)
        rows.append(BlockStatistics(mean.square().mean().item(), variance.mean().item()))

    return rows, [block.register_forward_hook(record) for stage in model.stages for block in stage]


def block_statistics(model: nn.Module, x: torch.Tensor) -> list[BlockStatistics]:
    """The statistics of every block's output, in the order in which the blocks run."""
    rows, handles = watch_blocks(model)
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def shaken(model):
    """Every gain, bias and skip gain away from its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "gain" in name:
                parameter.add_(0.1 * torch.randn_like(parameter) + (0.5 if "skip" in name else 0))
    return model.eval()


def slow_but(quick: set[str], names: Iterable[str]) -> list[Any]:
    """Parameters of a test, of which all but the quick ones are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Residual(nn.Module):
    def __init__(self, channels, gain=None):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gain = None if gain is None else nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        out = self.conv(F.relu(self.norm(x)))
        return x + (out if self.gain is None else out * self.gain)


def residual_network(**arguments):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Residual(8, **arguments), nn.Dropout(0.5), Residual(8, **arguments)
    )


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
"""An input of `residual_network`."""
