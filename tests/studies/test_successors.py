"""DyT and Derf as their authors define them, and networks of the studies with them."""

import pytest
import torch
from torch import nn

from normfree.studies.cifar_resnets import NORMS, CifarResNet, timm_resnet18
from normfree.studies.successors import DynamicErf, DynamicTanh, bn_resnet
from tests.helpers import assert_allclose


def test_they_are_bounded_functions_with_scale_and_shift():
    x = torch.linspace(-3, 3, 24).view(2, 3, 4)
    tanh, erf = DynamicTanh(3), DynamicErf(3)
    assert_allclose(tanh(x), (0.5 * x).tanh())
    assert_allclose(erf(x), (0.5 * x).erf())
    with torch.no_grad():
        erf.shift.fill_(0.3)
        erf.alpha.fill_(2)
        erf.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        erf.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    assert_allclose(erf(x)[:, 1], (2 * x[:, 1] + 0.3).erf() * 2 + 1)
    assert {name: p.numel() for name, p in erf.named_parameters()} == {"alpha": 1, "shift": 1, "weight": 3, "bias": 3}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factory", [CifarResNet, timm_resnet18])
def test_networks_have_what_is_named_in_the_place_of_every_batch_norm(norm, factory):
    width = {"width": 8} if factory is CifarResNet else {"width": 16}
    model, batch = factory(norm=norm, **width), factory(**width)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in batch.modules())
    kind = {"none": nn.Identity, "group": nn.GroupNorm}.get(norm, NORMS[norm])
    found = sum(type(module) is kind for module in model.modules())
    assert found >= count
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="norm is 'layer'; it must be batch, group, none, dyt, derf"):
        factory(norm="layer")


@pytest.mark.parametrize("norm", ["dyt", "derf"])
def test_the_batch_norm_resnet_has_them_too(norm):
    model = bn_resnet(norm, 26, width=0.25, num_classes=5, in_channels=1)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model(torch.randn(1, 1, 32, 32)).sum().backward()
    with pytest.raises(ValueError, match="norm is 'batch'; it must be dyt or derf"):
        bn_resnet("batch")
