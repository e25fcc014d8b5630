"""Layers of classes that only pad or crop around what torch's layer computes are converted, and keep their forward."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree
from normfree.conversion import convert, load_converted
from normfree.nn.scaled_layer import ScaledWS
from tests.helpers import assert_allclose

SIGNALS = torch.randn(8, 4, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(8, 4, 9, 9, generator=torch.Generator().manual_seed(0))
POINTS = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


class Cropping(nn.Conv1d):
    """As causal convolutions are often written."""

    def __init__(self, inputs, outputs, kernel):
        super().__init__(inputs, outputs, kernel, padding=kernel - 1)

    def forward(self, x):
        return super().forward(x)[..., : -self.padding[0]]


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class StaticSame(nn.Conv2d):
    """As EfficientNet-PyTorch's: it holds its padding."""

    def __init__(self, *args):
        super().__init__(*args)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, self.padding, self.dilation)


class Reflected(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, self.bias)


class OwnLinear(nn.Module):
    """No subclass of torch's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Squared(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight**2, self.bias)


class Doubled(nn.Conv1d):
    def forward(self, x):
        return 2 * super().forward(x)


class Rectified(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class BiasTwice(nn.Conv1d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias * 2)


class Turned(OwnLinear):
    """Its weight is (inputs, outputs), as in GPT-2."""

    def __init__(self, inputs, outputs):
        super().__init__(outputs, inputs)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def network(make, norm, *shape):
    torch.manual_seed(0)
    model = nn.Sequential(make(4, 8, *shape), norm(8), nn.ReLU(), make(8, 8, *shape), norm(8))
    for module in model.modules():
        if isinstance(module, norm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model


PADDING = {
    "cropped": (lambda: network(Cropping, nn.BatchNorm1d, 3), SIGNALS),
    "causal": (lambda: network(Causal, nn.BatchNorm1d, 3), SIGNALS),
    "padding that it holds": (lambda: network(StaticSame, nn.BatchNorm2d, 2), IMAGES),
    "reflected": (lambda: network(Reflected, nn.BatchNorm2d, 3), IMAGES),
    "another linear layer": (lambda: network(OwnLinear, nn.BatchNorm1d), POINTS),
}
OTHERS = {
    "squared weight": (lambda: network(Squared, nn.BatchNorm1d), POINTS),
    "doubled": (lambda: network(Doubled, nn.BatchNorm1d, 3), SIGNALS),
    "rectified": (lambda: network(Rectified, nn.BatchNorm2d, 3), IMAGES),
    "bias twice": (lambda: network(BiasTwice, nn.BatchNorm1d, 3), SIGNALS),
    "turned weight": (lambda: network(Turned, nn.BatchNorm1d), POINTS),
}


@pytest.mark.parametrize(("make", "x"), PADDING.values(), ids=PADDING)
def test_what_only_pads_is_converted_and_goes_on_padding(make, x, tmp_path):
    model = make()
    conversion = convert(model, x)
    assert not conversion.kept
    free = conversion.model
    assert isinstance(free[0], ScaledWS)
    with torch.no_grad():
        out = free[0](x)
        plain = copy.deepcopy(model[0])
        plain.weight.copy_(free[0].effective_parameters()[0])
        plain.bias.copy_(free[0].effective_parameters()[1])
        assert_allclose(out, plain(x), rtol=1e-5, atol=1e-5)
    assert out.var([0, *range(2, out.ndim)], correction=0).mean().item() == pytest.approx(
        model[1].weight.square().mean().item(), rel=0.05
    )
    assert_allclose(torch.compile(free, backend="eager", fullgraph=True)(x), free(x), rtol=1e-5, atol=1e-5)
    free(x).sum().backward()
    assert all(p.grad is not None for p in free.parameters())
    expected = free.eval()(x)
    assert_allclose(normfree.fold(free)(x), expected, rtol=1e-4, atol=1e-4)
    assert type(normfree.fold(free)[0]) is type(model[0])
    assert_allclose(pickle.loads(pickle.dumps(free))(x), expected, rtol=0, atol=0)
    conversion.save(tmp_path / "free.safetensors")
    assert_allclose(load_converted(make(), tmp_path / "free.safetensors").eval()(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("make", "x"), PADDING.values(), ids=PADDING)
def test_its_function_is_kept(make, x):
    model = make()
    for _ in range(20):
        model(x)
    conversion = convert(model, x, keep="function")
    assert not conversion.kept
    assert_allclose(conversion.model.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "x"), OTHERS.values(), ids=OTHERS)
def test_what_computes_more_keeps_its_normalizer(make, x):
    with pytest.raises(ValueError, match=r"computes something of its own|is no layer of torch"):
        convert(make(), x)


class HoldsItsNorm(nn.Conv2d):
    """As detectron2's: it normalizes, and may activate, what it has convolved."""

    def __init__(self, inputs, outputs, norm, activation=None):
        super().__init__(inputs, outputs, 3, bias=False)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = self.norm(F.conv2d(x, self.weight, self.bias))
        return x if self.activation is None else self.activation(x)


def holding(activation=None):
    torch.manual_seed(0)
    first = HoldsItsNorm(4, 8, nn.BatchNorm2d(8), activation)
    model = nn.Sequential(first, nn.ReLU(), HoldsItsNorm(8, 8, nn.BatchNorm2d(8)), nn.ReLU(), nn.Conv2d(8, 2, 1))
    for _ in range(5):
        model(IMAGES)
    return model.eval()


@pytest.mark.parametrize("keep", ["weights", "function"])
def test_a_convolution_that_holds_its_normalizer_is_converted(keep, tmp_path):
    model = holding()
    conversion = convert(model, IMAGES, keep=keep)
    free = conversion.model
    assert not conversion.kept
    assert all(isinstance(free[index], ScaledWS) for index in (0, 2))
    assert not any("norm" in name for name in free.state_dict())
    expected = free(IMAGES).detach()
    if keep == "function":
        assert_allclose(expected, model(IMAGES).detach(), atol=1e-5)
    again = load_converted(holding(), conversion.save(tmp_path / "c.safetensors")).eval()
    for name, other in {"copied": copy.deepcopy(free), "folded": normfree.fold(free), "loaded": again}.items():
        assert_allclose(other(IMAGES), expected, atol=1e-5, what=name)
    free.train()(IMAGES[:1]).square().sum().backward()
    assert all(p.grad is not None for p in free.parameters())


def test_one_that_activates_too_keeps_it_or_an_affine_map():
    (kept,) = convert(holding(torch.relu), IMAGES).kept
    assert (kept.path, kept.note) == (
        "0.norm", "normalizes the output of 0: a HoldsItsNorm computes something of its own"
    )  # fmt: skip
    model = holding(torch.relu)
    conversion = convert(model, IMAGES, keep="function")
    assert not conversion.kept
    assert_allclose(conversion.model(IMAGES), model(IMAGES), atol=1e-5)
