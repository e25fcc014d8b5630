"""Networks of the paper: structure, counts and costs as the authors' have them, arguments, and images of any size."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from normfree import create_model, list_models
from normfree.models.cost import cost
from normfree.nn import ScaledWSConv2d
from tests.helpers import assert_close, assert_equal, reference_json, shaken

ZOO = reference_json("zoo_reference.json")
OURS = {
    r"NF_ResNet(\d+)-width4": "nf_resnet{}",
    r"ResNet(\d+)-BN-preact-width4": "bn_resnet{}",
    r"SkipInit_ResNet(\d+)-width4": "skipinit_resnet{}",
    r"ResNet(\d+)-BN-postact-width4": "bn_resnet{}_postact",
    r"FixUp_ResNet(\d+)-width4": "fixup_resnet{}",
    r"NF_RegNet-B(\d)-width(0.75|1.0)": "nf_regnet_b{}",
    r"NFNet-F(\d)": "nfnet_f{}",
}


def zoo_entries():
    """Entry, our name, our arguments."""
    for entry in ZOO:
        for pattern, name in OURS.items():
            if match := re.fullmatch(pattern + "(-se)?", entry):
                arguments = {"se_ratio": 0.25} if entry.endswith("-se") else {}
                arguments |= {"width": float(match[2])} if "RegNet" in entry else {}
                yield entry, name.format(match[1]), arguments


@pytest.mark.parametrize(("entry", "name", "arguments"), list(zoo_entries()))
def test_counts_and_structure_equal_the_reference(entry, name, arguments):
    with torch.device("meta"):
        model = create_model(name, **arguments)
    expected = ZOO[entry]
    count = sum(p.numel() for p in model.parameters())
    assert count == expected["params"], f"{entry}: {count} parameters, expected {expected['params']}"
    blocks = [block for stage in model.stages for block in stage]
    branches = [[m for m in getattr(block, "branch", block).modules() if isinstance(m, nn.Conv2d)] for block in blocks]
    assert [conv[0].out_channels for conv in branches] == expected["block_inner_width"]
    assert [conv[1].groups for conv in branches] == expected.get("block_groups", [1] * len(blocks))
    if "block_stochdepth_rate" in expected and not name.startswith("bn"):
        assert [block.drop_rate for block in blocks] == pytest.approx(expected["block_stochdepth_rate"])
    for field in ("train_imsize", "test_imsize", "drop_rate"):
        if field in expected:
            assert getattr(model.config, field.replace("imsize", "size")) == expected[field], field


TRACED = [
    pytest.param(
        name,
        int(size),
        arguments,
        macs,
        ZOO[entry]["params"],
        id=f"{entry} at {size}",
        marks=[pytest.mark.slow] if re.search(r"nfnet_f[3-7]|resnet600|resnet288|regnet_b[678]", name) else [],
    )
    for entry, name, arguments in zoo_entries()
    for size, macs in ZOO[entry].get("macs_traced_by_imsize", {}).items()
]
"""Networks whose multiply-accumulates the reference has counted, at one size of images or more."""


@pytest.mark.parametrize(("name", "size", "arguments", "macs", "parameters"), TRACED)
def test_multiply_accumulates_equal_the_reference(name, size, arguments, macs, parameters):
    counted = cost(name, size=size, **arguments)
    assert (counted.macs, counted.parameters) == (macs, parameters)


def test_the_list_has_every_network_in_every_form():
    depths = (26, 50, 101, 152, 200, 288, 600)
    forms = ("nf_resnet{}", "nf_resnet{}_unstandardized", "bn_resnet{}", "bn_resnet{}_relu_bn")
    forms += ("bn_resnet{}_postact", "unnormalized_resnet{}", "skipinit_resnet{}", "fixup_resnet{}")
    names = [form.format(depth) for form in forms for depth in depths]
    names += [f"nf_regnet_b{level}" for level in range(9)]
    names += [f"nfnet_f{level}{plus}" for level in range(8) for plus in ("", "_plus")]
    assert sorted(list_models()) == sorted(names)


def test_weight_decay_of_the_regnets_grows_with_their_level():
    for level in range(9):
        with torch.device("meta"):
            model = create_model(f"nf_regnet_b{level}")
        assert model.config.weight_decay == pytest.approx(5e-5 + 1e-5 * level)


def test_betas_equal_the_reference():
    model = create_model("nf_resnet50", width=0.25, dtype=torch.float64)
    scales = [block.conv[0].in_scale.item() for stage in model.stages for block in stage]
    gamma = scales[0]  # β of the first block is 1
    assert [scale / gamma for scale in scales] == pytest.approx(ZOO["NF_ResNet50-width4"]["beta"], rel=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "nf_resnet26",
        "bn_resnet26",
        "bn_resnet26_relu_bn",
        "bn_resnet26_postact",
        "unnormalized_resnet26",
        "skipinit_resnet26",
        "fixup_resnet26",
        "nf_regnet_b0",
    ],
)
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("size", [(57, 57), (64, 96), (33, 34), (1, 1)])
def test_images_of_any_height_and_width_have_logits(name, padding, size):
    model = create_model(name, width=0.25, num_classes=7, padding=padding).eval()
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 7)
    assert bool(logits.isfinite().all()), logits


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_tanh", "selu"])
def test_no_example_sees_another(activation):
    torch.manual_seed(0)
    model = create_model(
        "nf_resnet26", width=0.5, num_classes=5, activation=activation, se_ratio=0.25, skip_gain=0.5,
        stochastic_depth_rate=0.0, dtype=torch.float64,
    )  # fmt: skip
    x = torch.randn(4, 3, 40, 33, dtype=torch.float64)
    alone = torch.cat([model(example[None]) for example in x])
    assert_close(model(x).detach(), alone.detach(), 1e-12)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("nf_regnet_b0", {"width": 0.25}),
        ("nfnet_f0", {"width": 0.25, "group_size": 32}),
        ("fixup_resnet26", {"width": 1}),
    ],
)
def test_no_example_sees_another_in_any_family(name, arguments):
    model = shaken(create_model(name, num_classes=5, dtype=torch.float64, **arguments))
    x = torch.randn(3, 3, 57, 40, dtype=torch.float64)
    alone = torch.cat([model(example[None]) for example in x])
    assert_close(model(x).detach(), alone.detach(), 1e-12)


def test_a_new_block_is_its_shortcut():
    """With SkipInit gains 0 the branch adds nothing."""
    model = create_model("nf_resnet26", width=0.25).eval()
    block = model.stages[0][1]
    x = torch.randn(2, 16, 8, 8)
    assert_equal(block(x), x)


def test_arguments_reach_the_network():
    model = create_model("nf_resnet26", width=1, num_classes=0, in_channels=1, drop_rate=0.3, se_ratio=0.5, alpha=0.3)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 512)
    assert model.head.drop.p == 0.3
    assert model.stages[0][0].gate.out_scale.item() == pytest.approx(0.3)
    assert model.stages[0][0].conv[2].out_scale.item() == 1
    assert model.stages[0][0].gate.fc0.out_features == 32
    reference, exact = (create_model("nf_resnet26", width=0.25, gains=g) for g in ("reference", "exact"))
    ratio = reference.head.in_scale / exact.head.in_scale
    assert ratio.item() == pytest.approx(1.7139588594436646 / 1.71285855044966, rel=1e-6)


def test_ablations_change_what_they_say():
    scaled = create_model("nf_resnet26_unstandardized", width=0.5)
    convolutions = [m for m in scaled.modules() if isinstance(m, ScaledWSConv2d)]
    assert {conv.standardize for conv in convolutions} == {False}
    assert scaled.stages[0][1].conv[0].in_scale.item() == pytest.approx(1.04**-0.5)  # β kept, γ = 1
    assert scaled.stages[0][1].conv[2].out_scale.item() == pytest.approx(0.2)  # α kept
    bare = create_model("unnormalized_resnet26", width=0.5)
    kinds = {type(m) for m in bare.modules()}
    assert not any("Norm" in kind.__name__ or kind is ScaledWSConv2d for kind in kinds)


def test_relu_and_batch_norm_stand_in_the_order_of_the_name():
    for name, kinds in (("bn_resnet26", [nn.BatchNorm2d, nn.ReLU]), ("bn_resnet26_relu_bn", [nn.ReLU, nn.BatchNorm2d])):
        model = create_model(name, width=0.25)
        assert [type(m) for m in model.stages[0][0].pre[0]] == kinds
        assert [type(m) for m in model.final] == kinds


@pytest.mark.parametrize("init", ["he", "reference"])
def test_new_weights_of_batch_norm_networks_have_the_variance_that_init_says(init):
    torch.manual_seed(0)
    model = create_model("bn_resnet26", width=2, init=init)
    weight = model.stages[3][1].conv[1].weight
    variance = (weight.var() * weight[0].numel()).item()
    assert variance == pytest.approx({"he": 2, "reference": 0.774}[init], rel=0.02), f"var · fan_in = {variance:.3f}"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("nf_resnet51", {}, "did you mean nf_resnet5"),
        ("nf_resnet50", {"widht": 1}, "no argument 'widht'"),
        ("nf_resnet50", {"activation": "rleu"}, "rleu"),
        ("nf_resnet50", {"activation": torch.nn.ReLU()}, r"activation is ReLU\(\); it must be str"),
        ("nf_resnet50", {"num_classes": -1}, "num_classes is -1"),
        ("nf_resnet50", {"stochastic_depth_rate": 1.0}, "stochastic_depth_rate is 1.0"),
        ("nf_resnet50", {"padding": "valid"}, "padding is 'valid'"),
        ("nf_resnet50", {"width": 0}, "width is 0"),
        ("nfnet_f0", {"width": 0.25}, "too little for one group"),
        ("nf_resnet50", {"gains": "authors"}, "gains is 'authors'"),
        ("bn_resnet50", {"alpha": 0.2}, "no argument 'alpha'"),
        ("bn_resnet50", {"init": "xavier"}, "init is 'xavier'"),
    ],
)
def test_errors_name_the_argument(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        create_model(name, **arguments)


def test_configurations_are_frozen():
    model = create_model("nf_resnet26", width=0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.width = 2


def test_dtype_is_restored_after_an_error():
    with pytest.raises(ValueError, match="width"):
        create_model("nf_resnet26", width=0, dtype=torch.float64)
    assert torch.get_default_dtype() == torch.float32
