"""Parts of blocks: pooling, gates, stochastic depth, the ledger, and what their passes over activations cost."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfree.benchmarks.peers import PlainResNet, open_and_steady
from normfree.models import create_model
from normfree.nn import MaxPool2d, SqueezeExcite, VarianceLedger
from tests.helpers import SEEDS, assert_allclose, assert_close, assert_equal, nchw, reference_arrays, seeded

UNITS = reference_arrays("units_f64.npz")


@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_max_pooling_equals_the_reference(size):
    case = f"max_pool3_same_s2/hw{size}"
    assert_equal(MaxPool2d()(nchw(UNITS[f"{case}/x"])), nchw(UNITS[f"{case}/y"]))


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 13), width=st.integers(1, 13), seed=SEEDS)
def test_max_pooling_pads_as_tensorflow_does_whatever_the_size(height, width, seed):
    x = torch.randn(1, 2, height, width, generator=seeded(seed))
    pads = []
    for size in (width, height):
        total = max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
        pads += [total // 2, total - total // 2]
    assert_equal(MaxPool2d()(x), F.max_pool2d(F.pad(x, pads, value=-math.inf), 3, 2))
    assert_equal(MaxPool2d("symmetric")(x), F.max_pool2d(x, 3, 2, 1))


def test_squeeze_excite_equals_the_reference():
    x = nchw(UNITS["se/x"])
    gate = SqueezeExcite.of_ratio(x.shape[1], 0.5).double()
    with torch.no_grad():
        for layer, name in ((gate.fc0, "linear"), (gate.fc1, "linear_1")):
            layer.weight.copy_(torch.from_numpy(UNITS[f"se/squeeze_excite/~/{name}//w"]).T)
            layer.bias.copy_(torch.from_numpy(UNITS[f"se/squeeze_excite/~/{name}//b"]))
    # The reference's module returns the gate alone.
    assert_close(gate(x).detach(), x * nchw(UNITS["se/y"]), 1e-10)


def test_gate_carries_the_branch_s_scales():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5)
    scaled, plain = SqueezeExcite(8, 2, gate_scale=2, out_scale=0.2, skip_gain=0.5), SqueezeExcite(8, 2)
    plain.load_state_dict({**scaled.state_dict(), "out_scale": torch.tensor(1.0)}, strict=False)
    assert_close(scaled(x).detach(), (2 * 0.2 * 0.5 * plain(x)).detach(), 1e-6)


def test_a_skip_gain_keeps_the_precision_of_what_it_multiplies():
    model = create_model("skipinit_resnet26", width=0.25, num_classes=4).eval()
    seen = []
    model.stages[0][1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32).bfloat16())
    assert seen == [torch.bfloat16]


def test_stochastic_depth_drops_branches_of_examples_without_rescaling():
    torch.manual_seed(0)
    model = create_model("nf_resnet26", width=0.25, skip_gain=1.0, stochastic_depth_rate=0.9, num_classes=4)
    block = model.stages[3][1]
    assert block.drop_rate == pytest.approx(0.9 * 7 / 8)
    x = torch.randn(64, 128, 4, 4)
    kept = block.eval()(x) - x
    out = block.train()(x) - x
    dropped = out.flatten(1).abs().amax(1) == 0
    assert 0.6 < dropped.float().mean() < 0.95, f"dropped {dropped.float().mean():.2f}, rate {block.drop_rate:.2f}"
    assert_allclose(out[~dropped], kept[~dropped], atol=1e-6)


def test_the_ledger_adds_alpha_squared_per_block_and_begins_each_stage_at_1():
    ledger = VarianceLedger(0.2)
    betas, variances = [], []
    for first in (True, False, False, True, False):
        betas.append(ledger.enter_block(first_in_stage=first))
        variances.append(ledger.variance)
    assert betas == pytest.approx([1, 1.04**-0.5, 1.08**-0.5, 1.12**-0.5, 1.04**-0.5])
    assert variances == pytest.approx([1.04, 1.08, 1.12, 1.04, 1.08])


def operations(model, x):
    """How often each operation, forward and backward, writes an activation: (N, C, H, W)."""
    counts = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.removeprefix("aten::").removesuffix("_")
            if name not in ("detach", "expand") and any(
                isinstance(t, torch.Tensor) and t.ndim == 4 and len(t) == len(x) for t in tree_leaves(out)
            ):
                counts[name] += 1
            return out

    with Watch():
        model(x).sum().backward()
    return counts


@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_no_pass_over_activations_beyond_those_of_plain_convolutions(padding):
    x = torch.randn(5, 3, 64, 64)  # no layer has 5 channels
    found = operations(open_and_steady(create_model("nf_resnet26", padding=padding)), x)
    limit = operations(PlainResNet((2, 2, 2, 2), padding), x)
    assert limit["convolution"] == 29
    assert found == limit, f"{found - limit} more, {limit - found} fewer"


@pytest.mark.parametrize("kind", ["forward", "backward", "global"])
def test_what_a_hook_has_seen_is_not_overwritten(kind):
    model = open_and_steady(create_model("nf_resnet26", width=0.25, num_classes=3))
    conv = model.stages[0][1].conv[0]
    x, seen = torch.randn(2, 3, 32, 32), []
    expected = model(x)
    if kind == "forward":
        conv.register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
    elif kind == "backward":
        conv.register_full_backward_hook(lambda module, inputs, outputs: seen.append((outputs[0], outputs[0].clone())))
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: seen.append((output, output.clone())) if module is conv else None
        )
    out = model(x)
    out.sum().backward()
    if kind == "global":
        handle.remove()
    assert_equal(out, expected)
    ((kept, copy),) = seen
    assert_equal(kept, copy, "what the hook has seen")
