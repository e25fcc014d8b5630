"""Fused kernels give what torch's operations give; without a GPU Triton interprets them."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from normfree import characterize, create_model
from normfree.nn import ScaledWSConv2d, ScaledWSLinear
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.standardization import composed
from tests.helpers import assert_allclose

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in a process that interprets Triton")


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="they run here themselves")
def test_they_pass_these_tests_in_a_process_that_interprets_triton():
    files = [__file__, __file__.replace("test_fused", "test_fused_groups")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout
    # This one, the next, three that compile, and three for GPUs.
    assert re.search(r"\d+ passed, 8 skipped", done.stdout), done.stdout


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="Triton works here")
def test_without_a_compiler_or_a_gpu_torch_s_operations_are_used():
    from normfree.nn import fused

    with pytest.warns(UserWarning, match="by slower kernels: Triton does not work here"):
        assert not fused._works(torch.device("cpu"))


LAYERS = {
    "3×3, skip gain and bias": lambda: ScaledWSConv2d(5, 4, 3, in_scale=1.7, out_scale=0.2, skip_gain=0.5),
    "grouped, without bias": lambda: ScaledWSConv2d(6, 4, 3, groups=2, bias=False, in_scale=0.9),
    "channels last": lambda: ScaledWSConv2d(3, 8, 3, skip_gain=0.3).to(memory_format=torch.channels_last),
    "long filters": lambda: ScaledWSConv2d(130, 3, 3),
    "linear": lambda: ScaledWSLinear(7, 3, in_scale=1.2),
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_values_and_gradients_are_those_of_the_formula(make, dtype):
    from normfree.nn import fused

    torch.manual_seed(0)
    layer = make().to(DEVICE, dtype)
    with torch.no_grad():
        layer.weight[1] *= 1e-4  # clamped
        layer.gain.normal_(1, 0.3)
        if layer.bias is not None:
            layer.bias.normal_()
    exact = make().to(DEVICE, torch.float64)
    exact.load_state_dict({name: t.double() for name, t in layer.state_dict().items()})
    found = fused.effective_parameters([layer.factors()], dtype)[0]
    expected = composed(exact.factors())
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    weigh = [torch.randn_like(t) if t is not None else None for t in found]
    ours, theirs = (
        sum((t.double() * w.double()).sum() for t, w in zip(outputs, weigh, strict=True) if t is not None)
        for outputs in (found, expected)
    )
    ours.backward()
    theirs.backward()
    assert found[0].dtype == dtype
    assert found[0].stride() == layer.weight.stride()
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_allclose(one.double(), other, rtol=tolerance, atol=tolerance)
    parameters = dict(exact.named_parameters())
    for name, parameter in layer.named_parameters():
        largest = parameters[name].grad.abs().max().item()
        difference = (parameter.grad.double() - parameters[name].grad).abs().max().item()
        assert difference <= tolerance * max(largest, 1), f"{name}: {difference}, largest {largest}, {parameter.shape}"


@needs_kernels
def test_it_rounds_to_another_dtype_and_refuses_second_derivatives():
    from normfree.nn import fused

    layer = ScaledWSConv2d(5, 4, 3, skip_gain=0.5).to(DEVICE)
    [(rounded, _)] = fused.effective_parameters([layer.factors()], torch.bfloat16)
    [(weight, _)] = fused.effective_parameters([layer.factors()], torch.float32)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), weight, rtol=2**-7, atol=0)  # the interpreter cuts off
    (grad,) = torch.autograd.grad(weight.square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def plain(layer, x):
    return layer(x)


def autocast(layer, x):
    with torch.autocast(DEVICE, torch.bfloat16):
        return layer(x)


def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def counted_and_checkpointed(layer, x):
    """What looks at the operations does so only in the first of the two forward passes."""
    with FlopCounterMode(display=False):
        return checkpointed(layer, x)


def kept_on_the_cpu(layer, x):
    with torch.autograd.graph.save_on_cpu():
        return layer(x)


def with_a_strided_gain(layer, x):
    return functional_call(layer, {"gain": torch.stack([layer.bias, layer.gain], 1)[:, 1]}, x)


WAYS = [plain, autocast, checkpointed, counted_and_checkpointed, kept_on_the_cpu]


@needs_kernels
@pytest.mark.parametrize("way", [*WAYS, with_a_strided_gain])
def test_layers_that_use_them_and_that_do_not_are_alike(way, monkeypatch):
    from normfree.nn import fused

    torch.manual_seed(0)
    layer = ScaledWSConv2d(5, 4, 3, padding="same", skip_gain=0.5).to(DEVICE)
    x = torch.randn(2, 5, 9, 9, device=DEVICE, requires_grad=True)
    results, used = [], []

    def kernels(layer):
        used.append(fused.supports(layer.factors()))
        return fused if used[-1] else None

    for choice in (kernels, lambda layer: None):
        monkeypatch.setattr(ScaledWS, "kernels", choice)
        layer.zero_grad()
        x.grad = None
        out = way(layer, x)
        out.float().square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters())])
    assert used
    assert set(used) == {way in WAYS}
    tolerance = 2e-2 if way is autocast else 1e-4
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@needs_kernels
def test_traced_layers_do_not_use_them():
    from normfree.nn import fused

    factors = ScaledWSConv2d(5, 4, 3).to(DEVICE).factors()
    assert fused.supports(factors)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not fused.supports(factors)
    assert not torch.func.grad(lambda gain: (gain * fused.supports(factors)).sum())(factors[1]).any()


@needs_kernels
def test_a_network_that_is_measured_and_checkpointed_at_once(monkeypatch):
    from normfree.nn import fused

    monkeypatch.setattr(ScaledWS, "kernels", lambda layer: fused if fused.supports(layer.factors()) else None)
    model = create_model("nf_resnet26", width=0.125, num_classes=3).to(DEVICE)
    model.set_grad_checkpointing()
    report = characterize(model, torch.randn(2, 3, 32, 32, device=DEVICE), backward=True)
    assert len(report) == 8
    assert min(record.gradient_variance for record in report) > 0


@pytest.mark.gpu
def test_layers_use_them_on_a_gpu():
    from normfree.nn import fused

    layer = ScaledWSConv2d(5, 4, 3)
    assert layer.kernels() is None
    assert layer.cuda().kernels() is fused
