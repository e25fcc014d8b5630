"""Convolutions as matrix products: the values and derivatives of torch's convolution, where they are faster."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import normfree.nn.conv as layers
from normfree import characterize, create_model
from normfree.nn import ScaledWSConv1d, ScaledWSConv2d
from normfree.nn.products import Window, convolve_as_product, prefers_product
from tests.helpers import assert_close


def convolved(input, weight, bias, window):
    return F.conv2d(input, weight, bias, window.stride, window.padding, window.dilation)


@settings(deadline=None)
@given(
    images=st.integers(1, 4), channels=st.integers(1, 9), filters=st.integers(1, 40), kernel=st.integers(1, 3),
    stride=st.integers(1, 3), padding=st.integers(0, 1), dilation=st.integers(1, 2), size=st.integers(5, 8),
    has_bias=st.booleans(), frozen=st.sampled_from(["", "input", "weight"]),
)  # fmt: skip
def test_values_and_gradients_are_those_of_a_convolution(
    images, channels, filters, kernel, stride, padding, dilation, size, has_bias, frozen
):
    torch.manual_seed(0)
    window = Window((kernel, kernel), (stride, stride), (padding * (kernel > 1),) * 2, (dilation, dilation))
    input = torch.randn(images, channels, size, size + 1, dtype=torch.float64, requires_grad=frozen != "input")
    weight = torch.randn(filters, channels, kernel, kernel, dtype=torch.float64, requires_grad=frozen != "weight")
    bias = torch.randn(filters, dtype=torch.float64, requires_grad=True) if has_bias else None
    found, wanted = (of(input, weight, bias, window) for of in (convolve_as_product, convolved))
    assert_close(found.detach(), wanted.detach(), 1e-12)
    tensors = [t for t in (input, weight, bias) if t is not None and t.requires_grad]
    grad = torch.randn_like(wanted)
    for one, other in zip(*(torch.autograd.grad(out, tensors, grad) for out in (found, wanted)), strict=True):
        assert_close(one, other, 1e-12)


@pytest.mark.parametrize("window", [
    Window((1, 1), (2, 2), (0, 0), (1, 1)), Window((1, 1), (1, 1), (0, 0), (1, 1)),
    Window((3, 3), (2, 2), (1, 1), (1, 1)),
], ids=str)  # fmt: skip
def test_second_derivatives_are_those_of_a_convolution(window):
    torch.manual_seed(0)
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5, 5), (4, 3, *window.kernel_size), (4,))
    ]
    torch.autograd.gradcheck(lambda *t: convolve_as_product(*t, window), tensors)
    torch.autograd.gradgradcheck(lambda *t: convolve_as_product(*t, window), tensors)


@pytest.fixture
def taken(monkeypatch):
    """Count the products that layers compute."""
    counted = []

    def count(*args):
        counted.append(args[0].shape)
        return convolve_as_product(*args)

    monkeypatch.setattr(layers, "convolve_as_product", count)
    return counted


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ScaledWSConv2d(32, 64, 1, stride=2, padding="same"), (4, 32, 9, 8)),
        (ScaledWSConv2d(8, 16, 1, in_scale=1.7, skip_gain=0.5), (16, 8, 6, 6)),
        (ScaledWSConv2d(8, 8, 3, padding=1), (4, 8, 4, 4)),
        (ScaledWSConv2d(8, 8, 3, 2, padding="same"), (4, 8, 5, 4)),
        (ScaledWSConv2d(8, 8, 3, padding="valid", dilation=2), (4, 8, 6, 6)),
        (ScaledWSConv2d(8, 8, 3, padding=1, padding_mode="reflect"), (4, 8, 4, 4)),
        (ScaledWSConv1d(8, 16, 1, stride=2), (4, 8, 40)),
    ],
    ids=str,
)
def test_a_layer_gives_what_torch_s_convolution_gives(layer, shape, taken):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in layer.parameters())]
    took = len(taken)
    x.grad = None
    layer.zero_grad()
    with torch.autograd.forward_ad.dual_level():  # any layer computes by torch's convolution in it
        out = layer(x)
    out.square().sum().backward()
    assert len(taken) == took
    assert took == (0 if layer.padding_mode == "reflect" or layer.padding == "valid" else 1)
    for one, other in zip(found, [out.detach(), x.grad, *(p.grad for p in layer.parameters())], strict=True):
        assert_close(one, other, 2e-5)


def test_products_are_taken_only_where_torch_would_call_onednn():
    narrow, wide = Window((1, 1), (1, 1), (0, 0), (1, 1)), Window((3, 3), (1, 1), (1, 1), (1, 1))
    strided = narrow._replace(stride=(2, 2))
    small = torch.randn(4, 8, 8, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert not prefers_product(small, narrow)
        assert prefers_product(torch.randn(16, 8, 8, 8), narrow)
        assert prefers_product(small, strided)
        torch.set_num_threads(2)
        assert prefers_product(small, narrow)
    finally:
        torch.set_num_threads(threads)
    assert prefers_product(small, wide)
    assert not prefers_product(torch.randn(4, 64, 32, 32), wide)  # its patches would be nine times its size
    assert not prefers_product(torch.randn(1, 8, 8, 8), strided)  # torch multiplies, too
    assert not prefers_product(small.to(memory_format=torch.channels_last), strided)
    assert not prefers_product(small[:0], strided)
    assert not prefers_product(torch.randn(4, 8, 2, 2), wide._replace(padding=(0, 0)))  # torch says what is wrong


@pytest.mark.parametrize("what", ["double", "bfloat16", "autocast", "functorch", "unbatched", "grouped"])
def test_others_are_computed_as_torch_does(what, taken):
    torch.manual_seed(0)
    layer, x = ScaledWSConv2d(8, 8, 1, 2, groups=2 if what == "grouped" else 1), torch.randn(4, 8, 6, 6)
    if what == "functorch":
        torch.func.vmap(layer)(x[None])
    elif what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
    elif what == "unbatched":
        assert layer(x[0]).shape == (8, 3, 3)
    else:
        dtype = getattr(torch, what, torch.float32)
        assert layer.to(dtype)(x.to(dtype)).dtype is dtype
    assert not taken
    with pytest.raises(RuntimeError, match="channels"):
        ScaledWSConv2d(8, 8, 1, 2)(torch.randn(4, 7, 6, 6))


def test_a_network_is_measured_and_checkpointed_at_once():
    model = create_model("nf_resnet26", width=0.125, num_classes=3)
    model.set_grad_checkpointing()
    report = characterize(model, torch.randn(2, 3, 32, 32), backward=True)
    assert min(record.gradient_variance for record in report) > 0
