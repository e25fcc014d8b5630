"""Statistics of channels: their definition, the authors' numbers, any shape and dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.trace.channels import channel_statistics
from tests.helpers import SEEDS, assert_close, assert_equal, nchw, reference_arrays, seeded


def definition(x, axis):
    rows = x.double().movedim(axis, 0).flatten(1)
    return torch.stack([rows.mean(1).square().mean(), rows.var(1, correction=0).mean()])


def test_they_are_the_authors():
    units = reference_arrays("units_f64.npz")
    squared_mean, variance = channel_statistics(nchw(units["signal_metrics/x"]), 1)
    assert_close(squared_mean, units["signal_metrics/avg_sq_mean_0"], 1e-12)
    assert_close(variance, units["signal_metrics/avg_var_0"], 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    axis=st.integers(0, 4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=SEEDS,
)
def test_of_any_shape_axis_and_dtype_they_are_the_definition_s(shape, axis, dtype, seed):
    axis, generator = axis % len(shape), seeded(seed)
    means = torch.randn([n if d == axis else 1 for d, n in enumerate(shape)], generator=generator)
    x = (torch.randn(shape, generator=generator) + means).to(dtype)
    before = x.clone()
    assert_close(channel_statistics(x, axis), definition(x, axis), 1e-9 if dtype == torch.float64 else 1e-5)
    assert_equal(x, before, "the input")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_mean_much_larger_than_the_deviation_costs_no_precision(layout):
    x = (0.3 * torch.randn(4, 8, 20, 20) + 30).contiguous(memory_format=layout)
    actual, expected = channel_statistics(x, 1), definition(x, 1)
    assert_close(actual / expected, torch.ones(2), 1e-5)


def test_channels_are_the_second_axis_but_of_sequences_the_last():
    for shape, axis in (((5, 3), 1), ((2, 7, 3), 2), ((2, 3, 4, 5), 1), ((2, 3, 4, 5, 6), 1)):
        x = torch.randn(shape)
        assert_equal(channel_statistics(x), channel_statistics(x, axis), f"axis of {shape}")


def test_what_is_not_a_number_is_not_hidden():
    statistics = channel_statistics(torch.tensor([[1.0, float("nan")]]))
    assert bool(torch.isnan(statistics).any()), statistics
