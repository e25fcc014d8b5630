"""Networks of ours as users of timm expect them."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.models.nfnet import model_cfgs
from torch import nn

from normfree import create_model, from_pretrained, from_timm, list_models, register_with_timm
from tests.helpers import assert_close, assert_equal, shaken

FAMILIES = {
    "nf_resnet26": {"width": 0.5},
    "nf_regnet_b0": {"width": 0.5},
    "nfnet_f0": {"width": 0.25, "group_size": 32},
    "bn_resnet26": {"width": 0.5},
    "bn_resnet26_postact": {"width": 0.5},
    "skipinit_resnet26": {"width": 0.5},
    "fixup_resnet26": {"width": 0.5},
}


if not timm.is_model("normfree_nf_resnet26"):  # another file has imported normfree before timm
    register_with_timm()


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_feature_info_says(name):
    backbone = timm.create_model(f"normfree_{name}", features_only=True, **FAMILIES[name]).eval()
    features = backbone(torch.randn(2, 3, 64, 96))
    assert [f.shape[1] for f in features] == backbone.feature_info.channels()
    assert backbone.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [f.shape[2:] for f in features] == [(64 // r, 96 // r) for r in (2, 4, 8, 16, 32)]


def test_some_features_need_only_a_part():
    whole = create_model("nf_resnet26", width=0.5).eval()
    backbone = timm.create_model("normfree_nf_resnet26", features_only=True, out_indices=(1, 2), width=0.5).eval()
    assert len(backbone.model.stages) == 2
    assert isinstance(backbone.model.final, nn.Identity)
    assert isinstance(backbone.model.get_classifier(), nn.Identity)
    backbone.model.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    final, features = whole.forward_intermediates(x, indices=[1, -3])
    assert_close(final.detach(), whole.forward_features(x).detach(), 1e-6)
    for ours, theirs in zip(backbone(x), features, strict=True):
        assert_equal(ours, theirs)
    stem = timm.create_model("normfree_nf_resnet26", features_only=True, out_indices=(0,), width=0.5)
    assert len(stem.model.stages) == 0
    assert stem(x)[0].shape == (2, 8, 32, 32)


@pytest.mark.parametrize("indices", [[5], [-6], [], 0, 6])
def test_features_that_do_not_exist_are_refused(indices):
    with pytest.raises(ValueError, match="there are 5 features"):
        create_model("nf_resnet26", width=0.25).forward_intermediates(torch.randn(1, 3, 32, 32), indices)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_classifier_has_its_classes_and_none_gives_what_is_pooled(name):
    model = create_model(name, num_classes=10, dtype=torch.float64, **FAMILIES[name]).eval()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    assert model.get_classifier().out_features == 10
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model(x).dtype == torch.float64
    assert model.num_classes == model.config.num_classes == 7
    model.reset_classifier(0)
    assert_equal(model(x) if model.head.bias is None else model(x) - model.head.bias.bias, pooled)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 2, 2)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize(("arguments", "words"), [((3, "sum"), "global_pool is 'sum'"), ((3, ""), "must be 0")])
def test_a_classifier_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        create_model("nf_resnet26", width=0.25).reset_classifier(*arguments)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_gradient(name):
    model = shaken(create_model(name, stochastic_depth_rate=0.5, dtype=torch.float64, **FAMILIES[name])).train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 1e-9)


def test_default_cfg_is_the_variant_s():
    model = timm.create_model("normfree_nf_regnet_b2", width=0.25)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 240, 240)
    assert timm.data.resolve_model_data_config(model, use_test_size=True)["input_size"] == (3, 272, 272)
    assert create_model("nf_regnet_b2", device="meta").default_cfg["input_size"] == (3, 240, 240)


def test_every_network_is_registered_and_none_of_timm_s_is_lost():
    assert set(timm.list_models("normfree_*")) == {f"normfree_{name}" for name in list_models()}
    assert model_cfgs.keys() <= set(timm.list_models())
    assert type(timm.create_model("nf_resnet26", num_classes=0)).__module__ == "timm.models.nfnet"


def test_timm_s_arguments_reach_the_network():
    model = timm.create_model(
        "normfree_nf_resnet26",
        num_classes=4,
        in_chans=1,
        drop_rate=0.1,
        drop_path_rate=0.2,
        global_pool="avg",
        width=0.5,
    )
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    assert model.config.stochastic_depth_rate == 0.2
    with pytest.raises(ValueError, match="no argument 'widht'"):
        timm.create_model("normfree_nf_resnet26", widht=1)


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_regnet_b0", "nfnet_f0"])
@pytest.mark.parametrize("stride", [8, 16])
def test_an_output_stride_dilates_as_in_timm(name, stride):
    ours = timm.create_model(f"normfree_{name}", output_stride=stride, num_classes=10)
    theirs = from_timm(timm.create_model(name.replace("nfnet_f0", "dm_nfnet_f0"), output_stride=stride, num_classes=10))
    geometry = [
        [
            (m.kernel_size, m.stride, m.dilation)
            for m in net.modules()
            if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1)  # of ResNets timm pools the shortcut
        ]
        for net in (ours, theirs)
    ]
    assert geometry[0] == geometry[1]
    features = timm.create_model(f"normfree_{name}", output_stride=stride, features_only=True)
    x = torch.randn(1, 3, 64, 64)
    assert [64 // f.shape[-1] for f in features(x)] == features.feature_info.reduction()
    assert features.feature_info.reduction()[-1] == stride
    with pytest.raises(ValueError, match="output_stride is 4; it must be one of 32, 16, 8"):
        create_model(name, output_stride=4)


@pytest.mark.parametrize(("pool", "pooled"), [("max", 1.0), ("avgmax", 0.5), ("avg", 0.0)])
def test_a_pooling_is_kept_with_the_network(pool, pooled, tmp_path):
    model = timm.create_model(
        "normfree_nf_resnet26", width=0.25, num_classes=3, global_pool=pool, act_layer=torch.nn.SiLU
    )
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x).detach()
    expected = pooled * features.amax((2, 3)) + (1 - pooled) * features.mean((2, 3))
    assert_close(model.forward_head(features, pre_logits=True), expected * model.head.in_scale, 1e-6)
    assert isinstance(model.final, torch.nn.SiLU)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(again(x), model.eval()(x), 1e-6)


@pytest.mark.parametrize(
    ("code", "registered"),
    [
        ("import timm, normfree", True),
        ("import normfree, timm", False),
        ("import normfree, timm; normfree.register_with_timm()", True),
        ("import timm, normfree; normfree.register_with_timm()", True),  # once more, without a warning
    ],
)
def test_networks_are_registered_where_timm_was_imported_before_and_when_asked(code, registered):
    code += "; print(len(timm.list_models('normfree_*')), timm.is_model('normfree_nf_resnet50'))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(len(list_models()) if registered else 0), str(registered)], done.stderr


def test_without_timm_nothing_can_be_registered(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(ImportError, match="timm"):
        register_with_timm()
