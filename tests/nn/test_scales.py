"""Scales of layers: they survive resets, the meta device, conversions of dtype, copies and files."""

import copy
import pickle

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import normfree
from normfree import create_model
from normfree.nn import ScaledWSConv2d, ScaledWSLinear
from normfree.nn.scales import Scales
from tests.helpers import assert_equal, assert_same_state, seeded

NETWORKS = {
    "nf_resnet26": {"width": 0.25, "se_ratio": 0.25, "skip_gain": 0.5},
    "nf_regnet_b0": {"width": 0.25},
    "nfnet_f0": {"width": 0.25, "group_size": 32},
    "skipinit_resnet26": {"width": 0.25},
}
X = torch.randn(8, 3, 64, 64, generator=seeded(0))


def network(name="nf_resnet26", **arguments):
    return create_model(name, num_classes=3, **NETWORKS[name], **arguments)


def scales(model):
    """Copies of all scales, by name: every buffer that a module with scales has registered as one."""
    found = {
        f"{path}.{name}" if path else name: value.clone()
        for path, module in model.named_modules()
        if isinstance(module, Scales)
        for name, value in module.named_buffers(recurse=False)
    }
    assert found
    assert {name.rpartition(".")[2] for name in found} <= {"in_scale", "out_scale"}
    return found


def reset(model):
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


@pytest.fixture(scope="module")
def conversion():
    torch.manual_seed(0)
    return normfree.convert(torchvision.models.resnet18(num_classes=10), X)


@pytest.fixture
def converted(conversion):
    return copy.deepcopy(conversion.model)


# ---- resets


def test_a_converted_network_that_is_reset_keeps_its_scales_and_its_signal_with_new_weights(converted):
    before, weights = scales(converted), {name: p.clone() for name, p in converted.named_parameters() if p.ndim > 1}
    assert len(weights) == 21
    variance = normfree.characterize(converted, X)[-1].variance
    torch.manual_seed(1)
    reset(converted)
    assert_same_state(scales(converted), before)
    for name, weight in weights.items():
        new = converted.get_parameter(name).detach()
        same = (new == weight).double().mean().item()
        assert same < 1e-3, f"{name}, shape {tuple(new.shape)}: {same:.1%} of it were not drawn anew"
    again = normfree.characterize(converted, X)[-1].variance
    assert variance / 4 < again < variance * 4, f"variance {again:.3f} after {variance:.3f}"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_ours_that_is_reset_keeps_its_scales(name):
    model = network(name)
    before = scales(model)
    assert_same_state(scales(reset(model)), before)


def test_skip_gains_are_reset_to_what_they_began_with():
    for value in (0.0, 0.5, 1.0):
        model = create_model("nf_resnet26", width=0.25, skip_gain=value)
        gains = [p for name, p in model.named_parameters() if name.endswith("skip_gain")]
        assert len(gains) == 8
        with torch.no_grad():
            for gain in gains:
                gain.fill_(7)
        reset(model)
        assert [gain.item() for gain in gains] == [value] * 8


def test_a_branch_that_a_normalizer_of_zeros_closed_is_closed_after_a_reset():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    nn.init.zeros_(model.layer1[0].bn2.weight)
    model = normfree.convert(model, X).model
    closed, opened = model.layer1[0].conv2, model.layer1[1].conv2
    assert (closed.skip_gain.item(), opened.skip_gain.item()) == (0, 1)
    with torch.no_grad():
        for layer in (closed, opened):
            layer.skip_gain.fill_(0.3)
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        reset(again)
        assert (again.layer1[0].conv2.skip_gain.item(), again.layer1[1].conv2.skip_gain.item()) == (0, 1)


# ---- the meta device


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("how", ["context", "argument", "moved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_network_that_was_on_the_meta_device_has_the_scales_of_one_made_directly(name, how, dtype):
    expected = scales(network(name, dtype=dtype))
    if how == "context":
        with torch.device("meta"):
            model = network(name, dtype=dtype)
    elif how == "argument":
        model = network(name, dtype=dtype, device="meta")
    else:
        model = network(name, dtype=dtype).to("meta")
    assert {p.is_meta for p in model.parameters()} == {True}
    model = model.to_empty(device="cpu")
    assert_same_state(scales(model), expected)
    assert_same_state(scales(reset(model)), expected)
    logits = model.eval()(X[:1].to(dtype))
    assert bool(logits.isfinite().all()), logits


TO_META = {
    "before": lambda model: model.double().to("meta"),
    "after": lambda model: model.to("meta").double(),
    "at once": lambda model: model.to("meta", torch.float64),
}


@pytest.mark.parametrize("order", TO_META)
def test_converted_on_its_way_to_the_meta_device_a_network_has_the_scales_of_its_dtype(order):
    model = TO_META[order](network()).to_empty(device="cpu")
    assert_same_state(scales(model), scales(network(dtype=torch.float64)))


def test_converted_where_the_meta_device_is_the_default_a_network_has_the_scales_of_its_dtype():
    expected = scales(network(dtype=torch.float64))
    with torch.device("meta"):
        model = network().double()
    assert_same_state(scales(model.to_empty(device="cpu")), expected)


# ---- conversions


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_regnet_b0", "nfnet_f0"])
def test_in_float64_scales_have_all_the_digits_of_a_network_made_so(name):
    expected = scales(network(name, dtype=torch.float64))
    assert {value.dtype for value in expected.values()} == {torch.float64}
    single = scales(network(name))
    rounded = [name for name, value in expected.items() if not torch.equal(value, single[name].double())]
    assert len(rounded) > 5  # in float32 they would be others
    for convert in (nn.Module.double, lambda model: model.to(torch.float64), lambda model: model.half().double()):
        assert_same_state(scales(convert(network(name))), expected)
    assert_same_state(scales(network(name, dtype=torch.bfloat16).double()), expected)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.float])
def test_in_half_precision_scales_stay_float32_and_equal(name, convert):
    expected = scales(network(name))
    assert {value.dtype for value in expected.values()} == {torch.float32}
    assert_same_state(scales(convert(network(name))), expected)
    assert_same_state(scales(convert(network(name).double())), expected)
    assert_same_state(scales(network(name, dtype=torch.bfloat16)), expected)


def test_a_layer_made_in_float64_has_the_very_number():
    layer = ScaledWSConv2d(3, 4, 3, in_scale=1 / 3, out_scale=0.1, dtype=torch.float64)
    assert (layer.in_scale.item(), layer.out_scale.item()) == (1 / 3, 0.1)
    assert layer.float().double().in_scale.item() == 1 / 3


def test_gradients_of_converted_layers_do_not_reach_their_scales():
    layer = ScaledWSLinear(3, 4, in_scale=1 / 3).double().half().float()
    assert [name for name, _ in layer.named_buffers()] == ["in_scale", "out_scale"]
    assert not any(value.requires_grad for value in layer.buffers())


# ---- values that somebody has set


CONVERSIONS = {
    "double": lambda layer: layer.double(),
    "half": lambda layer: layer.half(),
    "half and double": lambda layer: layer.half().double(),
    "double and float": lambda layer: layer.double().float(),
    "meta": lambda layer: layer.to("meta").to_empty(device="cpu"),
    "meta and double": lambda layer: layer.to("meta").double().to_empty(device="cpu"),
    "double and meta": lambda layer: layer.double().to("meta").to_empty(device="cpu"),
    "emptied": lambda layer: layer.to_empty(device="cpu"),
    "reset": reset,
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_a_scale_that_somebody_has_set_survives(how):
    for layer in (
        ScaledWSConv2d(3, 4, 1, in_scale=1 / 3, out_scale=0.2),
        ScaledWSLinear(3, 4, in_scale=1 / 3, out_scale=0.2),
    ):
        layer.out_scale.fill_(1.7)  # nobody knows its further digits
        converted = CONVERSIONS[how](layer)
        expected = 1 / 3 if converted.in_scale.dtype == torch.float64 else torch.tensor(1 / 3).item()
        assert converted.in_scale.item() == expected
        assert converted.out_scale.item() == torch.tensor(1.7).item()


def test_a_scale_that_was_set_in_float64_keeps_the_digits_that_it_has():
    layer = ScaledWSConv2d(3, 4, 1, in_scale=1 / 3).double()
    layer.in_scale.fill_(1.7)
    assert copy.deepcopy(layer).to("meta").to_empty(device="cpu").in_scale.item() == 1.7
    assert layer.float().in_scale.item() == torch.tensor(1.7).item()


def test_the_scales_of_a_conversion_survive_conversions_of_dtype(converted):
    before = scales(converted)
    assert_same_state(scales(copy.deepcopy(converted).bfloat16()), before)
    for name, value in scales(copy.deepcopy(converted).double()).items():
        assert_equal(value.float(), before[name], name)


# ---- copies and files


@pytest.mark.parametrize("made", [*NETWORKS, "converted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_copies_and_files_keep_scales_and_what_a_conversion_makes_of_them(made, dtype, converted, tmp_path):
    model = (converted if made == "converted" else network(made)).to(dtype)
    expected, exact = scales(model), scales(copy.deepcopy(model).double())
    torch.save(model, tmp_path / "model.pt")
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert_same_state(scales(again), expected)
        assert_same_state(scales(again.double()), exact)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_that_is_loaded_brings_its_scales(assign, dtype, converted, tmp_path):
    converted.to(dtype)
    save_file(converted.state_dict(), tmp_path / "state.safetensors")
    other = copy.deepcopy(converted)
    for module in other.modules():
        if isinstance(module, Scales):
            for value in module.buffers(recurse=False):
                value.fill_(1.0)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"), assign=assign)
    assert_same_state(scales(other), scales(converted))
    assert_equal(other.eval()(X[:1].to(dtype)), converted.eval()(X[:1].to(dtype)), "logits")


def test_scales_are_set_to_those_of_a_layer_on_the_meta_device_with_all_their_digits():
    layer = ScaledWSConv2d(3, 4, 1, in_scale=1.0)
    layer.copy_scales(ScaledWSConv2d(3, 4, 1, in_scale=1 / 3, out_scale=0.2, device="meta"))
    assert (layer.in_scale.item(), layer.out_scale.item()) == (torch.tensor(1 / 3).item(), torch.tensor(0.2).item())
    layer.double()
    assert (layer.in_scale.item(), layer.out_scale.item()) == (1 / 3, 0.2)


@pytest.mark.parametrize("keep", ["function", "weights"])
def test_nothing_of_the_old_weights_is_left_in_a_converted_network_that_is_reset(keep):
    torch.manual_seed(0)
    trained = torchvision.models.densenet121(num_classes=10)
    with torch.no_grad():
        for module in trained.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(25.0)
                module.running_mean.fill_(3.0)
    free = normfree.convert(trained, X[:2], keep=keep).model
    expected = {"channel_scale": 1, "channel_center": 0, "scale": 1, "center": 0, "gain": 1, "bias": 0}
    seen = set()
    for module in reset(free).modules():
        if not type(module).__module__.startswith("normfree"):
            continue
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in expected:
                seen.add(name)
                assert bool((value == expected[name]).all()), name
    assert seen >= ({"channel_scale", "scale"} if keep == "function" else {"gain"})
