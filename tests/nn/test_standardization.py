"""Standardization of weights against its formula, with its derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from normfree.nn import ScaledWSConv2d, standardize
from normfree.nn.standardization import Factors, composed, effective_parameters
from tests.helpers import SEEDS, assert_close, assert_equal, seeded


def formula(weight, scale, eps=1e-4):
    """W_eff as the paper writes it, in differentiable operations."""
    rows = weight.flatten(1)
    variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    return ((rows - mean) * torch.rsqrt((variance * rows.shape[1]).clamp(min=eps)) * scale[:, None]).view_as(weight)


def weights(dtype=torch.float64):
    """Ordinary filters, one nearly constant (clamped), one constant, one large."""
    torch.manual_seed(0)
    weight = 0.2 * torch.randn(8, 4, 3, 3, dtype=dtype)
    weight[2] = 0.5 + weight[2] * 1e-4
    weight[3] = 0.25
    weight[4] *= 1e3
    return weight, torch.randn(8, dtype=dtype)


@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0])
def test_values_and_gradients_are_those_of_the_formula(eps):
    results = []
    for function in (standardize, formula):
        weight, scale = (t.requires_grad_() for t in weights())
        out = function(weight, scale, eps)
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        results.append([out.detach(), *torch.autograd.grad(out, (weight, scale), cotangent)])
    for actual, expected, what in zip(*results, ("value", "grad_weight", "grad_scale"), strict=True):
        assert_close(actual, expected, 1e-12, what)


@pytest.mark.parametrize("eps", [1e-4, 1.0])
def test_channels_last_weights_stay_so(eps):
    weight, scale = weights()
    last = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    plain, cotangent = weight.clone().requires_grad_(), torch.randn_like(weight)
    results = [torch.autograd.grad(standardize(w, scale, eps), w, cotangent)[0] for w in (plain, last)]
    out = standardize(last, scale, eps)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert results[1].is_contiguous(memory_format=torch.channels_last)
    assert_close(*results, 1e-12)
    assert_close(out.detach(), standardize(weight, scale, eps), 1e-12)


def test_gradients_are_those_of_finite_differences():
    weight, scale = weights()
    assert torch.autograd.gradcheck(standardize, (weight[:3].requires_grad_(), scale[:3].requires_grad_()))


@settings(max_examples=40, deadline=None)
@given(
    filters=st.integers(1, 6),
    channels=st.integers(1, 5),
    kernel=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    spread=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e3]),
    mean=st.sampled_from([0.0, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=SEEDS,
)
def test_values_are_those_of_the_formula_for_any_shape_and_scale(filters, channels, kernel, spread, mean, dtype, seed):
    noise = torch.randn(filters, channels, *kernel, dtype=dtype, generator=seeded(seed))
    weight = (mean + spread * noise).requires_grad_()
    out = standardize(weight, torch.ones(filters, dtype=dtype))
    expected = formula(weight.double(), torch.ones(filters, dtype=torch.float64))
    # Float32 leaves 1e-7 · |W| of rounding in a constant filter, which the standardization enlarges by up to 1/√eps.
    tolerance = 1e-10 if dtype == torch.float64 else max(3e-4, 2e-5 * weight.detach().abs().max().item())
    assert_close(out.detach().double(), expected.detach(), tolerance)
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    assert bool(torch.isfinite(gradient).all()), f"{gradient}, shape {tuple(gradient.shape)}"


def test_bfloat16_is_the_rounded_float32():
    weight, scale = (t.bfloat16() for t in weights(torch.float32))
    out = standardize(weight, scale)
    assert out.dtype == torch.bfloat16
    assert_equal(out, standardize(weight.float(), scale.float()).bfloat16())


def test_per_sample_gradients_equal_a_loop():
    weight, scale = weights()
    xs = torch.randn(5, *weight.shape, dtype=weight.dtype)

    def loss(weight, scale, x):
        return (standardize(weight, scale) * x).square().sum()

    together = vmap(grad(loss, (0, 1)), (None, None, 0))(weight, scale, xs)
    apart = [grad(loss, (0, 1))(weight, scale, x) for x in xs]
    for i, what in enumerate(("weight", "scale")):
        assert_close(together[i], torch.stack([gradients[i] for gradients in apart]), 1e-10, what)


def test_mapped_over_weights_it_equals_a_loop():
    weight, scale = weights()
    stacked = torch.stack([weight, 2 * weight + 1])
    out = vmap(standardize, (0, None))(stacked, scale)
    assert_close(out, torch.stack([standardize(w, scale) for w in stacked]), 1e-12)


def test_second_derivatives_are_those_of_the_formula():
    """Where filters are clamped, too."""
    weight, scale = weights()
    results = []
    for function in (standardize, formula):
        leaf = weight.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, scale).pow(3).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    assert_close(*results, 1e-9)


@pytest.mark.parametrize("shape", [(6, 8, 3, 3), (6, 8, 1, 1), (6, 1, 3, 3), (6, 1, 1, 1), (1, 8, 3, 3), (6, 2, 3, 1)])
@pytest.mark.parametrize("together", [False, True])
def test_the_layout_of_the_memory_changes_nothing(shape, together):
    """Strides of one weight may fit several layouts: of one input channel, of one position."""
    torch.manual_seed(0)
    weight, other = torch.randn(2, *shape, dtype=torch.float64)
    gain = torch.randn(shape[0], dtype=torch.float64)
    grad = torch.randn(shape, dtype=torch.float64)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = weight.clone().contiguous(memory_format=layout).requires_grad_()
        group = [Factors(leaf, gain)] + [Factors(other.contiguous(memory_format=layout), gain)] * together
        out = effective_parameters(group)[0].weight
        for order in (torch.contiguous_format, torch.channels_last):
            (of_weight,) = torch.autograd.grad(out, leaf, grad.contiguous(memory_format=order), retain_graph=True)
            results.append((out.detach(), of_weight))
    expected = formula(leaf.detach().contiguous(), gain)
    for out, of_weight in results:
        assert_close(out, expected, 1e-12)
        assert_close(of_weight, results[0][1], 1e-12)


@pytest.mark.parametrize("size", [1e19, 1e30, 1e38])
@pytest.mark.parametrize("learns", [True, False])
def test_filters_whose_variance_overflows_are_no_numbers_rather_than_zero(size, learns):
    """Of others that stand beside them nothing changes."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    expected = standardize(weight, torch.ones(4))
    weight[2] *= size
    weight.requires_grad_(learns)
    found = standardize(weight, torch.ones(4)).detach()
    assert found[2].isnan().all()
    assert_equal(found[[0, 1, 3]], expected[[0, 1, 3]])
    assert_equal(composed(Factors(weight, torch.ones(4)))[0].detach()[2].isnan(), torch.ones(3, 3, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("weight", "scale", "error", "words"),
    [
        ([[1.0]], torch.ones(1), TypeError, "weight is no tensor of floating-point numbers, but a list"),
        (torch.ones(2, 2, dtype=torch.long), torch.ones(2), TypeError, "weight is no tensor of floating-point numbers"),
        (torch.ones(2, 2), 1.0, TypeError, "scale is no tensor of floating-point numbers, but a float"),
        (torch.ones(2, 2), torch.ones(3), ValueError, r"weight has shape \(2, 2\) and scale \(3,\)"),
        (torch.ones(2), torch.ones(2), ValueError, r"weight has shape \(2,\)"),
        (torch.ones(0, 2), torch.ones(0), ValueError, r"weight has shape \(0, 2\)"),
    ],
)
def test_what_are_no_filters_is_refused(weight, scale, error, words):
    with pytest.raises(error, match=words):
        standardize(weight, scale)


def test_an_eps_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="eps is a str; it must be a number"):
        standardize(torch.ones(2, 2), torch.ones(2), "small")


def test_a_layer_computes_on_its_device_whatever_the_default_is():
    layer, x = ScaledWSConv2d(5, 7, 3, skip_gain=0.5, out_scale=0.3), torch.randn(2, 5, 8, 8)
    with torch.device("meta"):
        layer(x).sum().backward()
    found = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    layer(x).sum().backward()
    for one, other in zip(found, [p.grad for p in layer.parameters()], strict=True):
        assert_equal(one, other)
