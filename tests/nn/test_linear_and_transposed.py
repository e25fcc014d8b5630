"""Linear layers and transposed convolutions with scaled standardized weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normfree
from normfree.nn import (
    ScaledWSConv1d,
    ScaledWSConvTranspose1d,
    ScaledWSConvTranspose2d,
    ScaledWSConvTranspose3d,
    ScaledWSLinear,
)
from tests.helpers import SEEDS, assert_allclose, assert_equal

TRANSPOSED = (ScaledWSConvTranspose1d, ScaledWSConvTranspose2d, ScaledWSConvTranspose3d)


def filled(layer):
    """In float64, its gains and biases at random; callers seed."""
    with torch.no_grad():
        layer.gain.uniform_(0.5, 2)
        if layer.bias is not None:
            layer.bias.normal_()
    return layer.double()


def test_a_linear_layer_is_a_convolution_of_one_position():
    torch.manual_seed(0)
    linear = filled(ScaledWSLinear(12, 7, in_scale=1.5, out_scale=0.2, skip_gain=0.5))
    conv = ScaledWSConv1d(12, 7, 1, in_scale=1.5, out_scale=0.2, skip_gain=0.5).double()
    state = linear.state_dict()
    conv.load_state_dict(state | {"weight": state["weight"][:, :, None]})
    x = torch.randn(5, 12).double()
    difference = (linear(x) - conv(x[:, :, None])[:, :, 0]).abs().max()
    assert difference < 1e-14, difference
    assert linear(x.view(1, 5, 12)).shape == (1, 5, 7)


@settings(max_examples=25, deadline=None)
@given(
    dims=st.integers(1, 3), groups=st.sampled_from([1, 2, 3]), kernel=st.integers(1, 3), stride=st.integers(1, 3),
    dilation=st.integers(1, 2), bias=st.booleans(), standardize=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_transposed_convolutions_are_torch_s(dims, groups, kernel, stride, dilation, bias, standardize, seed):
    """The function is torch's on a weight whose every output channel has filters of mean 0 and variance 1/N."""
    torch.manual_seed(seed)
    layer = filled(
        TRANSPOSED[dims - 1](
            6 * groups, 4 * groups, kernel, stride, padding=0, output_padding=0, groups=groups, bias=bias,
            dilation=dilation, in_scale=3.0, standardize=standardize,
        )
    )  # fmt: skip
    weight, shift = layer.effective_parameters()
    x = torch.randn(2, 6 * groups, *[4] * dims).double()
    call = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    expected = call(x, weight, shift, stride, 0, 0, groups, dilation)
    assert_allclose(layer(x), expected, atol=1e-12)
    by_group = weight.view(groups, 6, 4, -1)  # (group, in, out, kernel)
    variance, mean = torch.var_mean(by_group, (1, 3), correction=0)
    if standardize:
        assert mean.abs().max() < 1e-12, f"mean={mean.abs().max():.1e}, expected 0"
        expected = (3 * layer.gain.view(groups, 4)) ** 2 / (6 * kernel**dims)
        assert_allclose(variance, expected, what="variance")
    plain = normfree.fold(layer)
    assert type(plain) is (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    assert plain.weight.is_contiguous()
    assert_allclose(plain(x), layer(x), atol=1e-12, what="folded")


@pytest.mark.parametrize("kind", [ScaledWSLinear, ScaledWSConvTranspose2d])
def test_gradients_copies_files_and_folding(kind):
    torch.manual_seed(0)
    layer = filled(kind(4, 3) if kind is ScaledWSLinear else kind(4, 6, 2, stride=2, groups=2, skip_gain=1.0))
    x = torch.randn(3, 4, *([] if kind is ScaledWSLinear else [3, 3])).double().requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))
    again = copy.deepcopy(layer)
    again.reset_parameters()
    again.load_state_dict(layer.state_dict())
    assert_equal(again(x), layer(x))
    folded = normfree.fold(nn.Sequential(layer))
    assert_allclose(folded(x), layer(x), atol=1e-12, what="folded")
    with pytest.raises(ValueError, match="eps is 0"):
        kind(4, 4, *([] if kind is ScaledWSLinear else [2]), eps=0)


def test_outputs_of_new_layers_have_unit_variance():
    torch.manual_seed(0)
    out = ScaledWSLinear(512, 256)(torch.randn(2048, 512))
    variance = out.var(0).mean().item()
    assert variance == pytest.approx(1, abs=0.02), f"var={variance:.3f}"
    out = ScaledWSConvTranspose2d(64, 64, 4, stride=2, padding=1, in_scale=2.0)(torch.randn(32, 64, 16, 16))
    variance = out.var((0, 2, 3)).mean().item()
    # On each border one row of 32 sees half of what the others see.
    assert variance == pytest.approx((31 / 32) ** 2, abs=0.01), f"var={variance:.3f}"


def test_output_size_as_in_torch():
    layer, plain = ScaledWSConvTranspose2d(3, 2, 3, stride=2), nn.ConvTranspose2d(3, 2, 3, stride=2)
    x = torch.randn(1, 3, 5, 5)
    assert layer(x, output_size=[12, 12]).shape == plain(x, output_size=[12, 12]).shape == (1, 2, 12, 12)
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=[40, 40])
