"""Gradients per example, through torch.func and through Opacus."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call, grad, vmap

import normfree
from normfree.privacy import per_sample_gradients
from tests.helpers import shaken

EXAMPLE = Path(__file__).parent.parent / "examples" / "differential_privacy.py"
pytestmark = pytest.mark.filterwarnings("ignore")  # of opacus and what it imports


def small():
    """Grouped, strided, transposed and linear layers, with a branch and in-place operations."""
    torch.manual_seed(0)
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5).double()
    network.fc = nn.Sequential(nn.Unflatten(1, (32, 4, 4)), nn.ConvTranspose2d(32, 8, 2, 2, groups=2, bias=False),
                               nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(512, 16),
                               nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 5)).double()  # fmt: skip
    return normfree.convert(network, torch.randn(8, 3, 32, 32).double()).model.train()


def loop(model, images, labels):
    """Parameter name -> gradients, one example after the other."""
    found = []
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    return dict(zip(dict(model.named_parameters()), map(torch.stack, zip(*found, strict=True)), strict=True))


def gated(name, **arguments):
    """One of this package's networks with gates at the ends of branches or inside of them."""
    rates = {"drop_rate": 0.0, "stochastic_depth_rate": 0.0}
    return shaken(normfree.create_model(name, num_classes=5, **{"width": 0.125} | rates | arguments)).double().train()


MODELS = {
    "converted": small,
    "squeeze-excite": lambda: gated("nf_resnet26", width=0.25, se_ratio=0.25),
    "nfnet": lambda: gated("nfnet_f0", group_size=16),
    "nf_regnet": lambda: gated("nf_regnet_b0", width=0.25),
}


@pytest.mark.parametrize("name", MODELS)
def test_through_torch_func_and_through_opacus_gradients_equal_a_loop_s(name):
    model, images, labels = MODELS[name](), torch.randn(4, 3, 32, 32).double(), torch.arange(4)
    expected = loop(model, images, labels)

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    mapped = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    wrapped = per_sample_gradients(model)
    F.cross_entropy(wrapped(images), labels).backward()
    assert mapped.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max() + 1e-12
        for how, found in (("torch.func", mapped[name]), ("opacus", parameter.grad_sample)):
            assert found.shape == expected[name].shape, f"{how}: {name} is of {tuple(found.shape)}"
            difference = (found - expected[name]).abs().max() / scale
            assert difference < 1e-9, f"{how}: {name} differs by {difference:.1e}"


def test_what_opacus_cannot_keep_private_is_refused_and_unchanged():
    kept = normfree.convert(torchvision.models.resnet18(), torch.randn(8, 3, 32, 32), exclude=["layer4"]).model
    with pytest.raises(ValueError, match=r"layer4\.0\.bn1 \(BatchNorm2d\) normalizes with the batch's statistics"):
        per_sample_gradients(kept)
    with pytest.raises(ValueError, match=r"layer4\.0\.bn1 \(BatchNorm2d\) trains and has buffers"):
        per_sample_gradients(kept.eval())
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match=r"1 \(BatchNorm2d\) normalizes with the batch's statistics"):
        per_sample_gradients(bare)
    assert any(m.inplace for m in kept.modules() if isinstance(m, nn.ReLU))  # what is refused is not changed


@pytest.mark.slow
def test_the_example_trains_with_differential_privacy(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--images", "48", "--batch", "16"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert "the original: 20 errors\nconverted: 0 errors\nepoch 1: ε = " in said
    assert "test accuracy" in said
