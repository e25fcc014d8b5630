"""Networks of timm's without normalizers, on our layers: the same function."""

import copy
import gc

import pytest
import timm
import torch
from timm.models.nfnet import model_cfgs
from torch import nn

from normfree import characterize, fold, from_timm
from normfree.benchmarks.measure import kept_bytes
from normfree.nn import PreActivationBlock, ScaledWSConv2d, recompute_weights
from tests.helpers import assert_close, assert_gradients, assert_same_state, shaken, slow_but

MOST_PARAMETERS = 150e6  # of which there are three copies at a time


def _parameters(name):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


SMALL_ENOUGH = [name for name in model_cfgs if _parameters(name) < MOST_PARAMETERS]
VARIATIONS = {
    "paper's form": ("nf_resnet26", {"skipinit": True, "gamma_in_act": True}),
    "in the activation, deep stem": ("dm_nfnet_f0", {"skipinit": True, "width_factor": 0.25, "group_size": 32}),
    "deep stem": ("nf_resnet26", {"stem_type": "deep_pool", "width_factor": 0.5}),
    "tiered stem": ("nf_seresnet26", {"stem_type": "deep_tiered", "gamma_in_act": True, "width_factor": 0.5}),
    "stride 16": ("nf_resnet26", {"output_stride": 16, "width_factor": 0.5}),
    "stride 8": ("nf_regnet_b0", {"output_stride": 8}),
    "stride 8, same": ("nf_ecaresnet26", {"output_stride": 8, "same_padding": True, "skipinit": True}),
    "attn_gain": ("nf_seresnet26", {"attn_gain": 1.5, "alpha": 0.4, "skipinit": True}),
    "no classifier": ("eca_nfnet_l0", {"num_classes": 0, "width_factor": 0.25, "group_size": 16}),
}


def same_logits(model, size, tolerance=1e-5):
    model = shaken(model)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        ours = from_timm(model)
        assert not any(type(module).__name__.startswith("ScaledStd") for module in ours.modules())
        assert_close(ours(x), expected, tolerance, "logits")
    return ours


@pytest.mark.parametrize("name", slow_but({name for name in SMALL_ENOUGH if "f1" not in name}, SMALL_ENOUGH))
def test_every_network_of_timm_s_has_the_same_logits(name):
    gc.collect()
    same_logits(timm.create_model(name, num_classes=10), (70, 57))


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("size", [(64, 64), (75, 90)])
def test_whatever_their_configurations_vary_the_logits_are_the_same(variation, size):
    name, arguments = VARIATIONS[variation]
    same_logits(timm.create_model(name, **{"num_classes": 10} | arguments), size)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("nf_resnet26", {}),
        ("nf_seresnet26", {"skipinit": True}),
        ("nf_regnet_b0", {"skipinit": True}),
        ("eca_nfnet_l0", {"width_factor": 0.5, "group_size": 16}),
    ],
)
def test_in_training_logits_and_gradients_are_the_same(name, arguments):
    """Stochastic depth and dropout draw the same numbers."""
    theirs = shaken(timm.create_model(name, num_classes=10, drop_path_rate=0.3, drop_rate=0.2, **arguments)).double()
    theirs.train()
    for module in theirs.modules():
        # As released its backward raises where an activation is multiplied in place.
        if hasattr(module, "inplace"):
            module.inplace = False
    if "skipinit" in arguments:
        for block in (m for m in theirs.modules() if type(m).__name__ == "NormFreeBlock"):
            block.drop_path = nn.Sequential(block.drop_path, _Copy())
    ours = from_timm(_without_copies(theirs))
    x = torch.randn(8, 3, 70, 57, dtype=torch.float64)
    gradients = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        inputs = x.clone().requires_grad_()
        logits = model(inputs)
        logits.square().mean().backward()
        gradients.append((logits.detach(), inputs.grad, model.stem[0].bias.grad))
    for ours_, theirs_ in zip(*gradients, strict=True):
        assert_close(ours_, theirs_, 1e-9)


class _Copy(nn.Module):
    """timm multiplies what comes out of here in place."""

    def forward(self, x):
        return x.clone()


def _without_copies(model):
    model = copy.deepcopy(model)
    for block in (m for m in model.modules() if type(m).__name__ == "NormFreeBlock"):
        if isinstance(block.drop_path, nn.Sequential):
            block.drop_path = block.drop_path[0]
    return model


def test_the_paper_s_form_trains():
    model = from_timm(timm.create_model("nf_resnet26", skipinit=True, gamma_in_act=True))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert_gradients(model)


@pytest.mark.parametrize("name", ["dm_nfnet_f0", "eca_nfnet_l0"])
def test_activations_are_recomputed(name):
    model = from_timm(timm.create_model(name, width_factor=0.25, group_size=16))
    recompute_weights(model)  # which weigh more than activations at this size
    x = torch.randn(4, 3, 96, 96)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        separate = kept_bytes(model, x)
    kept = kept_bytes(model, x)
    assert kept <= 0.65 * separate, f"{name} keeps {kept / separate:.3f}"


def test_it_is_still_timm_s_network():
    theirs = timm.create_model("nf_regnet_b0").eval()
    theirs.stem.conv.weight.requires_grad_(False)
    before = copy.deepcopy(theirs.state_dict())
    ours = from_timm(theirs)
    assert not ours.training
    assert not ours.stem.conv.weight.requires_grad
    assert type(ours) is type(theirs)
    x = torch.randn(2, 3, 64, 64)
    for one, other in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
        assert_close(one.detach(), other.detach(), 1e-5)
    assert_close(fold(ours)(x).detach(), theirs(x).detach(), 1e-5)
    ours.reset_classifier(3)
    assert ours(x).shape == (2, 3)
    assert_same_state(theirs.state_dict(), before)


def test_its_signal_is_that_of_timm_s():
    model, x = timm.create_model("nf_seresnet26", attn_gain=3.0), torch.randn(2, 3, 64, 64)
    theirs, ours = characterize(model, x), characterize(from_timm(model), x)
    for one, other in zip(theirs, ours, strict=True):
        assert other.variance == pytest.approx(one.variance, rel=0.02)
        # timm multiplies by the attention's gain after the gate, we in it
        assert other.residual_variance == pytest.approx(9 * one.residual_variance, rel=0.02)
    assert ours[1].expected_variance == pytest.approx(1.08)


def test_networks_that_are_not_supported_are_refused_and_named():
    with pytest.raises(ValueError, match=r"timm\.models\.resnet\.ResNet"):
        from_timm(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="CbamModule"):
        from_timm(timm.create_model("nf_seresnet26", attn_layer="cbam", attn_kwargs={}, width_factor=0.25))
    with pytest.raises(ValueError, match="PreActivationBlock"):
        from_timm(from_timm(timm.create_model("nf_resnet26", width_factor=0.25)))
    model = timm.create_model("nf_resnet26", width_factor=0.25)
    model.stages[0][0].conv2 = nn.Conv2d(16, 16, 3)
    with pytest.raises(ValueError, match="a convolution is a Conv2d"):
        from_timm(model)


def test_in_half_precision_scales_stay_exact():
    ours = from_timm(timm.create_model("nf_resnet26", width_factor=0.25).bfloat16())
    convolutions = [m for m in ours.modules() if isinstance(m, ScaledWSConv2d)]
    assert {c.weight.dtype for c in convolutions} == {torch.bfloat16}
    assert {c.in_scale.dtype for c in convolutions} == {torch.float32}
    assert sum(isinstance(m, PreActivationBlock) for m in ours.modules()) == 8
