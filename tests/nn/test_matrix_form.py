"""The matrix form computes what the layer computes otherwise."""

import pytest
import torch
from torch import nn

from normfree import ScaledWSConv2d
from normfree.nn import ScaledWSLinear, matrix_form, scaled_layer
from tests.helpers import assert_close
from tests.nn.small_networks import F64, ChannelsLast, assert_same, outcome, scaled


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: ScaledWSConv2d(16, 64, 3, padding=1, **kw),
        lambda **kw: ScaledWSConv2d(16, 64, 3, padding="same", stride=2, **kw),
        lambda **kw: ScaledWSConv2d(16, 64, 3, padding="valid", dilation=2, **kw),
        lambda **kw: ScaledWSConv2d(16, 64, 3, padding=1, padding_mode="reflect", **kw),
        lambda **kw: ScaledWSConv2d(16, 64, 1, stride=2, **kw),
        lambda **kw: ChannelsLast(ScaledWSLinear(16, 64, **kw)),
    ],
)
@pytest.mark.parametrize("skip_gain", [None, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_the_matrix_form_is_the_layer(make, skip_gain, bias, monkeypatch):
    torch.manual_seed(0)
    model = make(skip_gain=skip_gain, bias=bias, in_scale=1.7, out_scale=0.3).double()
    (layer,) = scaled(model)
    with torch.no_grad():
        layer.weight -= 0.8 * layer.weight.flatten(1).mean(1).view(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight[3] *= 1e-6  # clamped
        layer.gain.normal_()
    x = torch.randn(2, 16, 5, 6, dtype=F64, requires_grad=True)
    expected, expected_x = outcome(model, x, passes=1), x.grad
    used = []
    monkeypatch.setattr(scaled_layer, "LARGE", 1)
    monkeypatch.setattr(matrix_form, "LARGE", 1)
    monkeypatch.setattr(matrix_form, "_TIMES", 0)
    apply = matrix_form._MatrixForm.apply
    monkeypatch.setattr(matrix_form._MatrixForm, "apply", lambda *args: used.append(1) or apply(*args))
    x.grad = None
    assert_same(outcome(model, x, passes=1), expected, 1e-12)
    assert_close(x.grad, expected_x, 1e-12)
    assert used
    with torch.no_grad():
        layer.weight += 5  # the mean is most of each filter
    x.grad = None
    used.clear()
    outcome(model, x, passes=1)
    assert used == [], "it would lose digits"


def test_a_large_weight_and_few_positions_take_the_matrix_form():
    weight = torch.empty(512, 512, 3, 3)
    assert matrix_form.prefers_matrix_form(weight, 8)
    assert not matrix_form.prefers_matrix_form(weight, 16 * 14 * 14)
    assert not matrix_form.prefers_matrix_form(torch.empty(64, 64, 3, 3), 1)


def test_one_position_may_be_overwritten_in_place():
    """A large weight on an image that has shrunk to one pixel."""
    torch.manual_seed(0)
    layer = ScaledWSConv2d(256, 512, 1)
    model, x = nn.Sequential(layer, nn.ReLU(inplace=True)), torch.randn(1, 256, 1, 1)
    assert matrix_form.prefers_matrix_form(layer.weight, 1)
    found = outcome(model, x, passes=1)
    with torch.no_grad():
        assert_close(found[0], nn.functional.conv2d(x, *layer.effective_parameters()).relu(), 1e-5)
    recomputed = nn.functional.conv2d(x, *layer.effective_parameters()).relu()
    model.zero_grad()
    (recomputed * torch.linspace(-1, 1, 512).view_as(recomputed)).sum().backward()
    for parameter, grad in zip(model.parameters(), found[1].values(), strict=True):
        assert_close(parameter.grad, grad, 1e-5)
