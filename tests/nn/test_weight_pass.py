"""The weight pass computes what each layer computes by itself."""

import contextlib
import copy
import io
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from normfree import ScaledWSConv2d, convert, create_model, fold
from normfree.nn import (
    ScaledWSConvTranspose2d,
    ScaledWSLinear,
    matrix_form,
    recompute_weights,
    scaled_layer,
    weight_pass,
)
from normfree.nn.weight_pass import attach, detach
from tests.helpers import assert_close
from tests.nn.small_networks import F64, ChannelsLast, assert_same, attached, hooked, images, net, outcome, scaled


def taken(model, x, monkeypatch):
    """How many layers of a pass find their weights computed."""
    found = []
    take = weight_pass._Pass.take
    monkeypatch.setattr(weight_pass._Pass, "take", lambda self, layer: found.append(take(self, layer)) or found[-1])
    model(x)
    monkeypatch.undo()
    return sum(one is not None for one in found)


def test_all_weights_of_a_network_are_computed_ahead_and_equal_those_of_each_layer(monkeypatch):
    model, x = net(), images()
    expected = outcome(model, x)
    assert_same(outcome(attached(model), x), expected)
    assert taken(model, x, monkeypatch) == 4


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_resnet26_unstandardized", "fixup_resnet50", "nf_regnet_b0"])
def test_networks_of_every_family_compute_the_same_with_and_without(name, monkeypatch):
    torch.manual_seed(0)
    arguments = {} if name == "nf_regnet_b0" else {"width": 0.25}
    model = create_model(name, num_classes=3, **arguments).double().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("skip_gain"):
            nn.init.constant_(parameter, 0.3)
    x = images(1, 32)
    ours = outcome(model, x, passes=2)
    monkeypatch.setattr(weight_pass.WeightPass, "begin", lambda *_: None)
    monkeypatch.setattr(scaled_layer, "LARGE", 1 << 60)
    assert_same(ours, outcome(model, x, passes=1), 1e-10)


@st.composite
def networks(draw):
    layers, channels = [], 3
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["conv", "transpose", "linear"]))
        out = draw(st.sampled_from([4, 6]))
        skip = draw(st.sampled_from([None, 0.0, 0.5]))
        common = {
            "bias": draw(st.booleans()), "skip_gain": skip, "in_scale": draw(st.sampled_from([1.0, 1.7])),
            "out_scale": draw(st.sampled_from([1.0, 0.2])), "standardize": draw(st.sampled_from([True, True, False])),
            "eps": draw(st.sampled_from([1e-4, 1e2])),
        }  # fmt: skip
        if kind == "conv":
            groups = 2 if channels % 2 == 0 and draw(st.booleans()) else 1
            padding = draw(st.sampled_from(["same", 1]))
            layers.append(ScaledWSConv2d(channels, out, 3, padding=padding, groups=groups, **common))
        elif kind == "transpose":
            layers.append(ScaledWSConvTranspose2d(channels, out, 3, padding=1, **common))
        else:
            layers.append(ChannelsLast(ScaledWSLinear(channels, out, **common)))
        if draw(st.booleans()):
            layers.append(nn.Tanh())
        channels = out
    repeated = draw(st.booleans())
    model = nn.Sequential(*layers, *((nn.Conv2d(channels, 3, 1), *layers) if repeated else ())).double()
    for layer in scaled(model):
        layer.weight.requires_grad_(draw(st.booleans()))
        layer.gain.requires_grad_(draw(st.booleans()))
        if layer.bias is not None:
            layer.bias.requires_grad_(draw(st.booleans()))
    if draw(st.booleans()):
        model = model.to(memory_format=torch.channels_last)
    return model


@settings(max_examples=40, deadline=None)
@given(networks(), st.sampled_from([torch.float64, torch.float32]), st.booleans())
def test_whatever_the_network_both_paths_agree_bit_for_bit(model, dtype, autocast):
    model = model.to(dtype)
    x = images(2, 6, dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = outcome(model, x)
        assert_same(outcome(attached(model), x), expected)


@pytest.mark.parametrize("large", [1, 1 << 60])
def test_second_derivatives_exist_in_every_path(large, monkeypatch):
    monkeypatch.setattr(scaled_layer, "LARGE", large)
    monkeypatch.setattr(matrix_form, "LARGE", large)
    monkeypatch.setattr(matrix_form, "_TIMES", 0)
    layer = ScaledWSConv2d(2, 3, 2, skip_gain=0.5).double()
    model = attached(nn.Sequential(layer))
    x = images(1, 3)[:, :2].requires_grad_()
    model(x)

    def function(*_):
        return model(x)

    inputs = (x, *model.parameters())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_layer_that_is_called_twice_or_alone_computes_its_own():
    model, x = attached(net()), images()
    expected = outcome(model, x)
    first = model[0]
    alone = first(x)
    assert_close(alone.detach(), nn.functional.conv2d(x, *first.effective_parameters(), padding=1).detach(), 0)
    assert_same(outcome(model, x), expected)
    twice = attached(nn.Sequential(ScaledWSConv2d(3, 3, 3, padding=1).double(), nn.ReLU()))
    twice.append(twice[0])
    plain = copy.deepcopy(twice)
    detach(plain)
    assert_same(outcome(twice, x), outcome(plain, x))


def test_losses_that_depend_on_different_layers_go_backward_one_after_the_other():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = ScaledWSConv2d(3, 2, 1), ScaledWSConv2d(3, 2, 1)

        def forward(self, x):
            return self.a(x), self.b(x)

    model = attached(Two().double())
    for _ in range(2):
        a, b = model(images())
        model.zero_grad()
        a.square().sum().backward()
        assert model.b.weight.grad is None
        before = model.a.weight.grad.clone()
        b.square().sum().backward()
    assert torch.equal(model.a.weight.grad, before)
    assert model.b.weight.grad is not None


def test_a_parameter_that_changes_is_seen_wherever_it_happens():
    x = images()

    class Changing(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            with torch.no_grad():
                self[1].weight.add_(torch.linspace(0, 1, self[1].weight.numel(), dtype=F64).view_as(self[1].weight))
            return self[1](x)

    torch.manual_seed(0)
    model = Changing(ScaledWSConv2d(3, 4, 1), ScaledWSConv2d(4, 4, 1)).double()
    other = attached(copy.deepcopy(model))
    for _ in range(3):
        assert_close(other(x).detach(), model(x).detach(), 0)
    model = attached(net())
    model(x)
    out = model(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        out.sum().backward()


def test_copies_and_pickles_have_passes_of_their_own(monkeypatch):
    model, x = attached(net()), images()
    expected = outcome(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert hooked(other) is not hooked(model)
        assert_same(outcome(other, x), expected)
        assert taken(other, x, monkeypatch) == 4
    model[4] = ScaledWSConv2d(6, 6, 3, padding=1).double()  # learned anew
    plain = copy.deepcopy(model)
    detach(plain)
    assert_same(outcome(model, x), outcome(plain, x))


def test_checkpointing_hooks_modes_and_torch_func_compute_layer_by_layer():
    model, x = net(), images()
    expected = outcome(model, x)

    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.inner, self.reentrant = model, reentrant

        def forward(self, x):
            x = checkpoint(self.inner[:3], x, use_reentrant=self.reentrant)
            return self.inner[3:](x)

    for reentrant in (True, False):
        wrapped = attached(Checkpointed(reentrant))
        out, grads = outcome(wrapped, x.requires_grad_())
        assert_same((out, {name.removeprefix("inner."): grad for name, grad in grads.items()}), expected)
    attach(model)
    outcome(model, x)
    for context in (torch.autograd.graph.save_on_cpu(), FlopCounterMode(display=False)):
        with context:
            assert_same(outcome(model, x, passes=1), expected)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(
        lambda p: (lambda out: (out * torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)).sum())(
            torch.func.functional_call(model, p, (x.detach(),))
        )
    )(parameters)
    assert_same((expected[0], grads), expected, 1e-12)


def test_compiled_and_symbolically_traced_it_computes_the_same():
    model, x = net(), images()
    expected = outcome(model, x)
    attach(model)
    model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    assert_close(out.detach(), expected[0], 1e-12)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [str(i) for i in range(7)]
    assert_close(traced(x).detach(), expected[0], 0)


def test_our_networks_are_traced_with_their_layers_as_leaves():
    model = create_model("nf_resnet26", width=0.25, num_classes=3).double().eval()
    traced = torch.fx.symbolic_trace(model)
    x = images(1, 32)
    assert_close(traced(x).detach(), model(x).detach(), 1e-12)


def test_threads_do_not_share_a_pass():
    model, x = attached(net()), images()
    expected = model(x).detach()
    model(x)
    failures = []

    def run():
        with contextlib.suppress(StopIteration):
            for _ in range(20):
                if not torch.equal(model(x).detach(), expected):
                    failures.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_pass_ends_with_the_forward_also_where_that_fails():
    model = attached(net())
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 5, 8, 8, dtype=F64))
    assert scaled_layer.in_force.source is None
    model(images())
    assert scaled_layer.in_force.source is None


def test_folding_leaves_no_hooks():
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = convert(original, images(8, dtype=torch.float32)).model
    assert model._forward_pre_hooks
    folded = fold(model)
    assert not folded._forward_pre_hooks
    assert not folded._forward_hooks


def test_weights_are_computed_again_where_that_is_asked_for(monkeypatch):
    model, x = attached(net()), images()
    expected = outcome(model, x)
    again = []
    compute = scaled_layer.standardized_again
    monkeypatch.setattr(scaled_layer, "standardized_again", lambda *args: again.append(1) or compute(*args))
    outcome(model, x)
    assert again == []
    recompute_weights(model)
    assert_same(outcome(model, x, passes=1), expected)
    assert again
    again.clear()
    recompute_weights(model, always=False)
    outcome(model, x)
    assert again == []
