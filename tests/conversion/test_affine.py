"""The affine map per channel: what stands for a normalizer, with `keep="function"`, that no layer can carry."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from normfree import fold, load_converted
from normfree.conversion import convert
from normfree.nn import ChannelAffine
from tests.helpers import assert_allclose, assert_equal

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def trained(model, x=IMAGES):
    """Give normalizers statistics, scales and shifts of their own."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    for _ in range(20):
        model(x)
    return model.eval()


class AfterReLU(nn.Sequential):
    """Rectifies before it normalizes, as ECAPA does, its input too."""

    def __init__(self, **arguments):
        convolutions = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8, **arguments), nn.Conv2d(8, 4, 3), nn.ReLU()
        super().__init__(nn.BatchNorm2d(3), *convolutions, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(576, 5))


MODELS = {
    "after an activation": (AfterReLU, IMAGES),
    "without a scale": (lambda: AfterReLU(affine=False), IMAGES),
    "DenseNet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5), torch.randn(4, 3, 64, 64)),
    "of vectors": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8)), torch.randn(8, 6)),
    "in one dimension": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Conv1d(6, 8, 3)), torch.randn(8, 6, 9)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_normalizer_with_statistics_goes_and_the_function_stays(name, tmp_path):
    build, x = MODELS[name]
    model = trained(build(), x)
    conversion = convert(model, x, keep="function")
    free = conversion.model
    assert not conversion.kept
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in free.modules())
    assert any(isinstance(m, ChannelAffine) for m in free.modules())
    expected = model(x).detach()
    assert_allclose(free(x), expected, atol=1e-5 * float(expected.abs().max()))
    out = free.train()(x)
    assert_allclose(free(x[:1]), out[:1], atol=1e-5 * float(expected.abs().max()), what="one example alone")
    again = load_converted(build(), conversion.save(tmp_path / "c.safetensors"))
    assert_allclose(again.eval()(x), expected, atol=1e-5 * float(expected.abs().max()))
    if name == "DenseNet":
        assert_allclose(fold(free)(x), expected, atol=1e-5 * float(expected.abs().max()))


def test_its_gradients_are_those_of_the_frozen_normalizer():
    norm = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).double(), IMAGES.double())
    norm[2].weight.data[1] = 0
    free = convert(norm, IMAGES.double(), keep="function").model
    for model in (norm, free):
        model(IMAGES.double()).square().sum().backward()
    assert isinstance(free[2], ChannelAffine)
    for name in ("weight", "bias"):
        assert_allclose(getattr(free[2], name).grad, getattr(norm[2], name).grad, rtol=1e-9)


def test_what_is_frozen_stays_frozen_and_what_is_copied_computes_the_same():
    model = trained(AfterReLU())
    model[3].requires_grad_(False)
    free = convert(model, IMAGES, keep="function").model
    assert [free[index].weight.requires_grad for index in (0, 3, 6)] == [True, False, True]
    assert_allclose(copy.deepcopy(free)(IMAGES), model(IMAGES), atol=1e-5)
    assert free[0].weight.shape == free[0].scale.shape == free[0].center.shape == (3,)
    free[0].reset_parameters()
    assert_equal(free[0](IMAGES), IMAGES)


def test_by_weights_alone_they_stay_or_go_as_before():
    conversion = convert(trained(AfterReLU()), IMAGES)
    assert [change.path for change in conversion.kept] == ["0"]
