"""Convolutions with scaled standardized weights: the authors' values, torch's interface, exact scales."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, grad, vmap

from normfree import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, create_model
from normfree.benchmarks.measure import kept_bytes
from normfree.nn import MaxPool2d
from tests.helpers import SEEDS, assert_close, assert_equal, reference_arrays

UNITS = reference_arrays("units_f64.npz")
CASES = sorted({key.split("/")[1] for key in UNITS if key.startswith("wsconv/")})
CLASSES = {1: ScaledWSConv1d, 2: ScaledWSConv2d, 3: ScaledWSConv3d}


def unit(case, name):
    return torch.from_numpy(UNITS[f"wsconv/{case}/{name}"])


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(case):
    meta = json.loads(str(UNITS["meta"]))["cases"][f"wsconv/{case}"]
    conv = ScaledWSConv2d(
        meta["cin"], meta["cout"], meta["kernel"], meta["stride"], "same",
        groups=meta["groups"], eps=meta["eps"], dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        conv.weight.copy_(unit(case, "w").permute(3, 2, 0, 1))
        conv.gain.copy_(unit(case, "gain"))
        conv.bias.copy_(unit(case, "bias"))
    x = unit(case, "x").permute(0, 3, 1, 2).requires_grad_()
    y = conv(x)
    y.backward(unit(case, "ct").permute(0, 3, 1, 2))
    assert_close(conv.effective_parameters()[0].detach().permute(2, 3, 1, 0), unit(case, "what_numpy"), 1e-10, "W_eff")
    assert_close(y.detach().permute(0, 2, 3, 1), unit(case, "y"), 1e-10, "y")
    assert_close(x.grad.permute(0, 2, 3, 1), unit(case, "grad_x"), 1e-10, "grad_x")
    assert_close(conv.weight.grad.permute(2, 3, 1, 0), unit(case, "grad_w"), 1e-10, "grad_w")
    assert_close(conv.gain.grad, unit(case, "grad_gain"), 1e-10, "grad_gain")
    assert_close(conv.bias.grad, unit(case, "grad_bias"), 1e-10, "grad_bias")


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2, "valid", "same"])
def test_is_torch_s_convolution_with_the_effective_weight(n, padding_mode, padding):
    torch.manual_seed(0)
    shared = {"padding": padding, "dilation": 2, "groups": 2, "padding_mode": padding_mode, "dtype": torch.float64}
    conv = CLASSES[n](4, 6, 3, in_scale=1.7, out_scale=0.2, skip_gain=0.5, **shared)
    plain = getattr(nn, f"Conv{n}d")(4, 6, 3, **shared)
    with torch.no_grad():
        conv.gain.normal_()
        conv.bias.normal_()
        for target, value in zip((plain.weight, plain.bias), conv.effective_parameters(), strict=True):
            target.copy_(value)
    x = torch.randn(2, 4, *(8, 9, 7)[:n], dtype=torch.float64)
    assert_close(conv(x).detach(), plain(x).detach(), 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    seed=SEEDS,
)
def test_same_padding_is_tensorflow_s(size, kernel, stride, dilation, seed):
    torch.manual_seed(seed)
    conv = ScaledWSConv2d(2, 3, kernel, stride, "same", dilation, dtype=torch.float64)
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    pads = []
    for s, k, d in zip(reversed(size), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-s // d) - 1) * d + dilation * (k - 1) + 1 - s, 0)
        pads += [total // 2, total - total // 2]
    weight, bias = conv.effective_parameters()
    expected = F.conv2d(F.pad(x, pads), weight, bias, stride, 0, dilation)
    assert conv(x).shape[2:] == tuple(-(-s // d) for s, d in zip(size, stride, strict=True))
    assert_close(conv(x).detach(), expected.detach(), 1e-12)


def test_in_scale_multiplies_the_input_and_the_others_the_output():
    """conv(x; in, out, skip) = out · skip · (standardized conv(in · x, W) · gain + bias)."""
    torch.manual_seed(0)
    conv = ScaledWSConv2d(3, 5, 3, padding=1, in_scale=1.3, out_scale=0.2, skip_gain=0.7, dtype=torch.float64)
    base = ScaledWSConv2d(3, 5, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        conv.bias.normal_()
    base.load_state_dict(
        {k: v for k, v in conv.state_dict().items() if k in ("weight", "gain", "bias")} | {
            "in_scale": torch.tensor(1.0), "out_scale": torch.tensor(1.0)
        }
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_close(conv(x).detach(), (0.2 * 0.7 * base(1.3 * x)).detach(), 1e-12)


def test_without_standardization_the_filters_are_left_alone():
    conv = ScaledWSConv2d(3, 5, 3, standardize=False, in_scale=2.0)
    assert_close(conv.effective_parameters()[0].detach(), 2 * conv.weight.detach(), 1e-6)


def test_new_weights_have_variance_1_over_fan_in_and_gains_are_1():
    """Without standardization 2 over fan-in (He)."""
    torch.manual_seed(0)
    for standardize, variance in ((True, 1), (False, 2)):
        conv = ScaledWSConv2d(64, 256, 3, standardize=standardize, skip_gain=0.0)
        value = (conv.weight.var() * 64 * 9).item()
        assert value == pytest.approx(variance, rel=0.02), f"var · fan_in = {value:.3f}"
        assert bool((conv.gain == 1).all())
        assert not bool(conv.bias.any())
        assert conv.skip_gain.item() == 0
    with torch.device("meta"):
        assert ScaledWSConv2d(3, 4, 3).gain.is_meta
    assert ScaledWSConv2d(3, 4, 3, bias=False).bias is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_the_layer_and_its_input(dtype):
    conv = ScaledWSConv2d(3, 4, 3, in_scale=1.7128585, out_scale=0.2).to(dtype)
    assert conv(torch.randn(1, 3, 8, 8, dtype=dtype)).dtype == dtype
    network = create_model("nf_resnet26", width=0.25, se_ratio=0.25).to(dtype).eval()
    assert network(torch.randn(1, 3, 32, 32, dtype=dtype)).dtype == dtype


def test_under_autocast_outputs_are_rounded_and_gradients_are_not():
    conv = ScaledWSConv2d(3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(torch.randn(1, 3, 8, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_no_elementwise_pass_over_activations():
    """Forward and backward, the activations are read by the convolution and nothing else."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, tuple) else (out,)
            if any(isinstance(result, torch.Tensor) and result.numel() > 10_000 for result in results):
                seen.append(func._schema.name)
            return out

    conv = ScaledWSConv2d(4, 4, 3, padding="same", in_scale=1.7, out_scale=0.2, skip_gain=0.5)
    x = torch.randn(2, 4, 64, 64, requires_grad=True)
    with Watch():
        out = conv(x)
    assert seen == ["aten::convolution"]
    cotangent = torch.randn_like(out)
    seen.clear()
    with Watch():
        out.backward(cotangent)
    assert [name for name in seen if "detach" not in name] == ["aten::convolution_backward"]


def test_saves_one_activation_and_the_weights():
    """Beyond what a plain convolution saves: the effective weight and a few numbers per filter."""
    x = torch.randn(2, 16, 32, 32)
    conv, plain = ScaledWSConv2d(16, 16, 3, skip_gain=1.0), nn.Conv2d(16, 16, 3)
    extra = kept_bytes(conv, x) - kept_bytes(plain, x)
    assert 0 < extra <= plain.weight.nbytes + 64 * 16 * 4, f"{extra} bytes"


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        ScaledWSConv2d(3, 8, 3, 2, "same", in_scale=1.2), nn.ReLU(), ScaledWSConv2d(8, 4, 1, skip_gain=0.5)
    ).double()


def test_compiled_and_exported_it_computes_the_same():
    net, x = network(), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = net(x)
    expected.sum().backward()
    gradient = net[0].weight.grad.clone()
    net.zero_grad()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    out.sum().backward()
    assert_close(out.detach(), expected.detach(), 1e-12)
    assert_close(net[0].weight.grad, gradient, 1e-12)
    exported = torch.export.export(net, (x,)).module()
    assert_close(exported(x).detach(), expected.detach(), 1e-12)


@pytest.mark.parametrize("size", [(15, 17), (16, 16), (33, 20)])
def test_exported_it_takes_images_of_other_sizes(size):
    dynamic = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    net = nn.Sequential(network(), MaxPool2d())
    example = torch.randn(2, 3, 24, 30, dtype=torch.float64)
    exported = torch.export.export(net, (example,), dynamic_shapes=(dynamic,)).module()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_close(exported(x).detach(), net(x).detach(), 1e-12)


def test_a_network_built_without_memory_is_a_new_one_once_it_is_reset():
    arguments = {"width": 0.25, "se_ratio": 0.25, "skip_gain": 0.5}
    with torch.device("meta"):
        model = create_model("nf_resnet26", **arguments)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    expected = create_model("nf_resnet26", **arguments)
    for (name, actual), reference in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        if "weight" not in name and "fc" not in name:  # linear layers are torch's, which resets them its own way
            assert_equal(actual, reference, name)
    assert bool(torch.isfinite(model.eval()(torch.randn(1, 3, 32, 32))).all())


def test_per_sample_gradients_equal_a_loop():
    net, xs = network(), torch.randn(4, 3, 9, 8, dtype=torch.float64)
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return functional_call(net, parameters, (x[None],)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, xs)
    apart = [grad(loss)(parameters, x) for x in xs]
    for name, gradients in together.items():
        assert_close(gradients.detach(), torch.stack([g[name] for g in apart]).detach(), 1e-10, name)


def test_copies_and_files_hold_the_same_function(tmp_path):
    conv = ScaledWSConv2d(3, 8, 3, in_scale=1.7, out_scale=0.2, skip_gain=0.5)
    twin = copy.deepcopy(conv)
    x = torch.randn(1, 3, 8, 8)
    assert_equal(twin(x), conv(x))
    save_file(conv.state_dict(), tmp_path / "conv.safetensors")
    fresh = ScaledWSConv2d(3, 8, 3, skip_gain=0.0)
    fresh.load_state_dict(load_file(tmp_path / "conv.safetensors"))
    assert_equal(fresh(x), conv(x))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="eps is 0"):
        ScaledWSConv2d(3, 4, 3, eps=0)
    with pytest.raises(ValueError, match="groups"):
        ScaledWSConv2d(3, 4, 3, groups=2)


def test_is_a_convolution_of_torch():
    for n, base in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        conv = CLASSES[n](2, 2, 3)
        assert isinstance(conv, base)
        assert conv.weight.shape == base(2, 2, 3).weight.shape
