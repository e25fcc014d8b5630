"""Parameter groups: which parameters decay, and that each is in one group."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

import normfree


def build(name):
    source, _, model = name.rpartition(":")
    if source == "timm":
        return timm.create_model(model, num_classes=10)
    return normfree.create_model(model, width=0.25, num_classes=10)


NETWORKS = ["nf_resnet26", "timm:resnet18", "timm:nf_resnet26", "timm:vit_tiny_patch16_224"]


def groups(model, weight_decay=1e-4):
    """Names of the parameters, by the weight decay of their group; none is in two."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in normfree.param_groups(model, weight_decay):
        assert group["weight_decay"] not in found, f"two groups of weight decay {group['weight_decay']}"
        found[group["weight_decay"]] = [names[id(p)] for p in group["params"]]
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_every_trained_parameter_is_in_exactly_one_group(name):
    model = build(name)
    found = [name for group in groups(model).values() for name in group]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_are_those_of_timm(name):
    """With its own rule that biases and vectors do not decay, and told that gains do not either."""
    model = build(name)
    listed = {"*.gain", *(model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())}
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=listed)
    expected = {group["weight_decay"]: {id(p) for p in group["params"]} for group in theirs}
    found = {g["weight_decay"]: {id(p) for p in g["params"]} for g in normfree.param_groups(model, 0.05)}
    assert expected.keys() == {0.0, 0.05}
    assert found == expected


def test_of_timm_s_normalizer_free_network_no_gain_decays_though_gains_have_four_axes():
    model = build("timm:nf_resnet26")
    gains = [name for name, p in model.named_parameters() if name.endswith(".gain")]
    assert {model.get_parameter(name).ndim for name in gains} == {4}
    assert len(gains) > 25
    found = groups(model)
    assert set(gains) <= set(found[0.0])
    assert {name.rpartition(".")[2] for name in found[1e-4]} == {"weight"}
    assert {name.rpartition(".")[2] for name in found[0.0]} == {"bias", "gain"}


def test_skip_gains_and_the_weights_of_normalizers_do_not_decay():
    for model, kinds in (
        (build("nf_resnet26"), {"bias", "gain", "skip_gain"}),
        (normfree.create_model("bn_resnet26", width=0.25), {"bias", "weight"}),
    ):
        found = groups(model)
        assert {name.rpartition(".")[2] for name in found[0.0]} == kinds
        layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        assert sorted(found[1e-4]) == sorted(f"{name}.weight" for name in layers)


class Listing(nn.Module):
    """With names and patterns of its own that do not decay."""

    def __init__(self, *listed):
        super().__init__()
        self.listed = listed
        self.tokens, self.position = nn.Parameter(torch.zeros(1, 3, 4)), nn.Parameter(torch.zeros(1, 5, 4))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def no_weight_decay(self):
        return set(self.listed)


@pytest.mark.parametrize(
    ("listed", "decaying"),
    [
        ((), ["blocks.0.weight", "blocks.1.weight", "position", "tokens"]),
        (("tokens",), ["blocks.0.weight", "blocks.1.weight", "position"]),
        (("token", "*.1"), ["blocks.0.weight", "blocks.1.weight", "position", "tokens"]),
        (("tokens", "blocks.1.*"), ["blocks.0.weight", "position"]),
        (("*.weight",), ["position", "tokens"]),
    ],
)
def test_names_and_patterns_that_the_model_lists_do_not_decay(listed, decaying):
    found = groups(Listing(*listed))
    assert sorted(found[1e-4]) == decaying
    assert {"blocks.0.bias", "blocks.1.bias"} <= set(found[0.0])


def test_frozen_parameters_are_left_out_and_so_is_a_group_of_none():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert groups(model) == {1e-4: ["1.weight"], 0.0: ["1.bias"]}
    model[1].bias.requires_grad_(False)
    assert groups(model) == {1e-4: ["1.weight"]}
    model.requires_grad_(False)
    assert normfree.param_groups(model, 1e-4) == []


def test_a_parameter_of_two_modules_is_in_one_group_once():
    tied = nn.Linear(4, 4, bias=False)
    assert groups(nn.Sequential(tied, nn.ReLU(), tied)) == {1e-4: ["0.weight"]}


@pytest.mark.parametrize("weight_decay", [-1e-4, float("nan")])
def test_a_weight_decay_that_cannot_be_is_refused(weight_decay):
    with pytest.raises(ValueError, match="weight_decay is "):
        normfree.param_groups(nn.Linear(2, 2), weight_decay)
