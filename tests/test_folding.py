"""Folding: the same function from plain layers that hold effective weights."""

import copy
import pickle

import pytest
import timm
import torch
import torch.distributed.fsdp
import torchvision
from torch import nn

from normfree import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, convert, create_model, fold
from normfree.folding import has_scaled_layers
from normfree.nn import ScaledWSLinear
from normfree.nn.padding import SameConv2d
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
    layers = [m for m in folded.modules() if isinstance(m, ScaledWS | nn.modules.conv._ConvNd)]
    strided_same = [m for m in layers if type(m) is SameConv2d]
    assert all(m.padding == "same" and m.stride == (2, 2) for m in strided_same)
    assert {type(m) for m in layers if m not in strided_same} == {nn.Conv2d}


@pytest.mark.parametrize(
    "name",
    ["nf_resnet26", "nf_regnet_b0", "nf_ecaresnet26", "eca_nfnet_l0", "resnetv2_50x1_bit", "vit_tiny_r_s16_p8_224"],
)
def test_a_folded_network_of_timm_s_computes_the_same(name):
    model = shaken(timm.create_model(name, num_classes=10))
    x = torch.randn(2, 3, *((224, 224) if "vit" in name else (64, 75)))
    folded = fold(model)
    assert not any("Std" in type(m).__name__ for m in folded.modules())
    with torch.no_grad():
        assert_close(folded(x), model(x), 1e-5, "logits")


class StdConv2d(nn.Conv2d):
    """Called as timm's, and another formula."""

    def forward(self, x):
        """Convolve with centred filters."""
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    eps = 1e-6


def test_a_layer_that_is_only_called_as_timm_s_is_left_alone():
    model = nn.Sequential(ScaledWSConv2d(3, 8, 3), StdConv2d(8, 8, 3))
    folded = fold(model)
    assert [type(m) for m in folded] == [nn.Conv2d, StdConv2d]
    with pytest.raises(ValueError, match="nothing to fold"):
        fold(model[1])


SCRIPTED = {
    "nf_resnet26": {},
    "nf_resnet50": {"padding": "symmetric", "se_ratio": 0.25},
    "nf_regnet_b0": {},
    "nfnet_f0": {"group_size": 16},
    "bn_resnet26_postact": {},
    "fixup_resnet26": {},
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")  # of torch.fx's own class
@pytest.mark.parametrize("name", SCRIPTED)
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_takes_folded_networks_at_any_size(name, how):
    model = shaken(create_model(name, num_classes=5, width=0.25, **SCRIPTED[name])).eval()
    model = fold(model) if has_scaled_layers(model) else model
    x = torch.randn(2, 3, 64, 64)
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
    for images in (x, torch.randn(3, 3, 75, 90)):
        with torch.no_grad():
            expected = model(images)
            assert expected.std() > 0
            assert_close(scripted(images), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("keep", ["weights", "function"])
@pytest.mark.parametrize("how", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 3, 64, 64))])
def test_torchscript_takes_folded_conversions(keep, how):
    torch.manual_seed(0)
    for build in (torchvision.models.resnet18, torchvision.models.densenet121):
        model = fold(convert(build(num_classes=3), torch.randn(4, 3, 64, 64), keep=keep).model)
        x = torch.randn(3, 3, 64, 64)
        with torch.no_grad():
            assert_close(how(model)(x), model(x), 1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_asks_for_a_folded_network():
    with pytest.raises(ValueError, match="TorchScript takes folded networks"):
        torch.jit.script(create_model("nf_resnet26", width=0.25))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch_s_tools_find_the_layers_of_a_folded_network():
    folded = fold(nn.Sequential(ScaledWSLinear(10, 8), nn.ReLU(), ScaledWSLinear(8, 3)))
    quantized = torch.ao.quantization.quantize_dynamic(folded, {nn.Linear})
    assert [type(m).__module__.startswith("torch.ao") for m in quantized] == [True, False, True]


@pytest.mark.parametrize("kind", [ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d])
def test_a_single_convolution_of_any_dimension_is_folded(kind):
    conv = shaken(kind(4, 6, 3, stride=2, padding="same", groups=2, padding_mode="circular", bias=False, in_scale=1.7))
    x = torch.randn(2, 4, *(9, 8, 7)[: conv.weight.ndim - 2])
    folded = fold(conv)
    assert folded.bias is None
    assert_close(folded(x), conv(x).detach(), 1e-6)


def test_the_weights_of_a_folded_network_do_not_train():
    folded = fold(create_model("nf_resnet26", width=0.25))
    assert not folded.training
    layers = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 29
    assert [p for layer in layers for p in layer.parameters() if p.requires_grad] == []


def test_folded_in_place_shared_modules_stay_shared():
    conv = ScaledWSConv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    expected = model(torch.ones(1, 3, 2, 2))
    assert fold(model, inplace=True) is model
    assert model[0] is model[2]
    assert type(model[0]) is nn.Conv2d
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


def test_what_cannot_be_folded_is_left_as_it_is():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="nothing to fold"):
        fold(model, inplace=True)
    assert model.training


def test_sharded_networks_are_refused_by_the_name_of_a_parameter(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        for call in (fold, lambda model: convert(model, torch.randn(2, 3, 8, 8))):
            with pytest.raises(ValueError, match=r"0\.weight is sharded over processes: take the network before"):
                call(model)
    finally:
        torch.distributed.destroy_process_group()
