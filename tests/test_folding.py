"""Folding: the same function from plain layers that hold effective weights."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from normfree import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, create_model, fold
from normfree.nn.scaled_layer import ScaledWS
from tests.helpers import assert_close, assert_equal, assert_same_state, shaken

OURS = {
    "nf_resnet26": {"width": 1, "se_ratio": 0.25},
    "nf_resnet50": {"width": 0.5, "padding": "symmetric"},
    "nf_resnet26_unstandardized": {"width": 1},
    "nf_regnet_b0": {},
    "nfnet_f0": {"width": 0.25, "group_size": 32},
}


@pytest.mark.parametrize("size", [(64, 64), (57, 70)])
@pytest.mark.parametrize("name", OURS)
def test_a_folded_network_computes_the_same_from_plain_layers(name, size):
    model = shaken(create_model(name, num_classes=10, **OURS[name]))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, *size)
    folded = fold(model)
    with torch.no_grad():
        assert_close(folded(x), model(x), 1e-6, "logits")
    assert_same_state(model.state_dict(), before)
    assert not any("gain" in key and "gate" not in key for key in folded.state_dict())
    kinds = {type(m).__name__ for m in folded.modules() if isinstance(m, ScaledWS | nn.modules.conv._ConvNd)}
    assert kinds == {"FoldedConv2d"}


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_regnet_b0", "nf_ecaresnet26", "eca_nfnet_l0"])
def test_a_folded_network_of_timm_s_computes_the_same(name):
    model = shaken(timm.create_model(name, num_classes=10))
    x = torch.randn(2, 3, 64, 75)
    with torch.no_grad():
        assert_close(fold(model)(x), model(x), 1e-5, "logits")


@pytest.mark.parametrize("kind", [ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d])
def test_a_single_convolution_of_any_dimension_is_folded(kind):
    conv = shaken(kind(4, 6, 3, stride=2, padding="same", groups=2, padding_mode="circular", bias=False, in_scale=1.7))
    x = torch.randn(2, 4, *(9, 8, 7)[: conv.weight.ndim - 2])
    folded = fold(conv)
    assert folded.bias is None
    assert_close(folded(x), conv(x).detach(), 1e-6)


def test_a_folded_network_says_that_it_does_not_train():
    folded = fold(create_model("nf_resnet26", width=0.25))
    with pytest.raises(RuntimeError, match="folded for inference"):
        folded.train()
    folded.eval()
    layers = [m for m in folded.modules() if type(m).__name__ == "FoldedConv2d"]
    assert len(layers) == 29
    assert [p for layer in layers for p in layer.parameters() if p.requires_grad] == []


def test_folded_in_place_shared_modules_stay_shared():
    conv = ScaledWSConv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    expected = model(torch.ones(1, 3, 2, 2))
    assert fold(model, inplace=True) is model
    assert model[0] is model[2]
    assert type(model[0]).__name__ == "FoldedConv2d"
    assert_close(model(torch.ones(1, 3, 2, 2)), expected.detach(), 1e-6)


def test_copied_compiled_and_exported_a_folded_network_computes_the_same():
    model = shaken(create_model("nf_resnet26", width=0.5, num_classes=4, padding="symmetric"))
    folded, x = fold(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = folded(x)
        assert_equal(copy.deepcopy(folded)(x), expected)
        assert_equal(pickle.loads(pickle.dumps(folded))(x), expected)
        assert_close(torch.compile(folded, backend="aot_eager", fullgraph=True)(x), expected, 1e-6)
        dynamic = {
            0: torch.export.Dim("batch"),
            2: torch.export.Dim("height", min=33),
            3: torch.export.Dim("width", min=33),
        }
        exported = torch.export.export(folded, (x,), dynamic_shapes=(dynamic,)).module()
        for shape in ((1, 3, 64, 64), (3, 3, 75, 90)):
            other = torch.randn(shape)
            assert_close(exported(other), folded(other), 1e-5)


def test_a_network_with_nothing_to_fold_is_refused():
    with pytest.raises(ValueError, match="nothing to fold"):
        fold(nn.Conv2d(3, 3, 1))
