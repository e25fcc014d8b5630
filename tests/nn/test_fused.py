"""The fused kernels give what torch's operations give; without a GPU Triton interprets them."""

import os
import subprocess
import sys

import pytest
import torch

from normfree.nn import ScaledWSConv2d, ScaledWSLinear

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in a process that interprets Triton")


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="they run here themselves")
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


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
    factors = layer._factors()
    found = fused.effective_parameters(*factors, eps=layer.eps, dtype=dtype)
    scale, bias = exact._scale_and_bias()
    expected = exact._effective_weight(exact.weight, scale), bias
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
        assert one is other is None or torch.allclose(one.double(), other, rtol=tolerance, atol=tolerance)
    parameters = dict(exact.named_parameters())
    for name, parameter in layer.named_parameters():
        largest = parameters[name].grad.abs().max().item()
        difference = (parameter.grad.double() - parameters[name].grad).abs().max().item()
        assert difference <= tolerance * max(largest, 1), name


@needs_kernels
def test_it_rounds_to_another_dtype_and_refuses_second_derivatives():
    from normfree.nn import fused

    layer = ScaledWSConv2d(5, 4, 3, skip_gain=0.5).to(DEVICE)
    rounded, _ = fused.effective_parameters(*layer._factors(), eps=1e-4, dtype=torch.bfloat16)
    weight, _ = fused.effective_parameters(*layer._factors(), eps=1e-4, dtype=torch.float32)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), weight, rtol=2**-7, atol=0)  # the interpreter cuts off
    (grad,) = torch.autograd.grad(weight.square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_use_them_on_a_gpu(autocast, monkeypatch):
    from normfree.nn import fused

    layer = ScaledWSConv2d(5, 4, 3, padding="same", stride=2, skip_gain=0.5).cuda()
    x = torch.randn(2, 5, 9, 9, device="cuda", requires_grad=True)
    assert fused.takes(layer.weight)
    results = []
    for usable in (True, False):
        monkeypatch.setattr(fused, "takes", lambda weight, usable=usable: usable)
        layer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = layer(x)
        out.float().square().sum().backward()
        results.append([out, *(p.grad for p in layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if autocast else 1e-4, atol=2e-2 if autocast else 1e-4)
