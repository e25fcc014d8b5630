"""Fused kernels of a group of layers give what those of each layer give, by one launch forward and one backward."""

import copy

import pytest
import torch
from torch import nn

from normfree import create_model
from normfree.nn import ScaledWSConv2d, recompute_weights, shared_weights
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.weight_pass import detach
from tests.helpers import assert_equal
from tests.nn.small_networks import assert_same, attached, images, net, outcome, scaled
from tests.nn.test_fused import DEVICE, INTERPRETED, ON_GPU, needs_kernels

pytest.importorskip("triton")


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched, in order; layers use them on any device."""
    from normfree.nn import fused

    fused._works(torch.device(DEVICE))  # by a launch of its own
    launch, found = fused._launch, []

    def recorded(kernel, *arguments, **options):
        found.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(ScaledWS, "kernels", lambda layer: fused if fused.supports(layer.factors()) else None)
    monkeypatch.setattr(fused, "_launch", recorded)
    return found


def group_of(dtype):
    """Layers with all that differs between layers, one of them clamped, one whose filters are long."""
    torch.manual_seed(0)
    layers = [
        ScaledWSConv2d(5, 4, 3, in_scale=1.7, out_scale=0.2, skip_gain=0.5),
        ScaledWSConv2d(6, 40, 1, groups=2, bias=False, in_scale=0.9),
        ScaledWSConv2d(3, 8, 3, skip_gain=0.3).to(memory_format=torch.channels_last),
        ScaledWSConv2d(130, 3, 3, bias=False, skip_gain=0.0),
        ScaledWSConv2d(2, 3, 3),
    ]
    for layer in layers:
        with torch.no_grad():
            layer.gain.normal_(1, 0.3)
            layer.weight[1] *= 1e-4
            if layer.bias is not None:
                layer.bias.normal_()
    return [layer.to(DEVICE, dtype) for layer in layers]


def weighed(results, skip=()):
    """A number that depends on each result in another way, but for those that are left out."""
    total = 0
    for index, result in enumerate(results):
        if result is not None and index not in skip:
            weights = torch.linspace(-1, 2, result.numel(), device=result.device, dtype=torch.float64)
            total = total + (result.flatten().double() * weights).sum()
    return total


@needs_kernels
@pytest.mark.parametrize("skip", [(), (0, 3), (0, 1, 9)], ids=["all", "without a weight and a bias", "a layer unused"])
@pytest.mark.parametrize(
    ("dtype", "of_result"),
    [(torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_a_group_computes_what_its_layers_do(dtype, of_result, skip):
    from normfree.nn import fused

    alone, together = group_of(dtype), group_of(dtype)
    theirs = [t for layer in alone for t in fused.effective_parameters([layer.factors()], of_result)[0]]
    ours = [t for both in fused.effective_parameters([layer.factors() for layer in together], of_result) for t in both]
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one is None) == (other is None), index
        if one is not None:
            assert_equal(one, other, str(index))
            assert one.stride() == other.stride()
    weighed(ours, skip).backward()
    weighed(theirs, skip).backward()
    for index, (one, other) in enumerate(zip(together, alone, strict=True)):
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            unused = 2 * index in skip and (name != "bias" or 2 * index + 1 in skip)
            if unused and 2 * index + 1 in skip:
                assert p.grad is None, f"{index} {name}"
            elif p.grad is None:
                assert not q.grad.any(), f"{index} {name}"  # alone it has zeros where nothing depends on it
            elif name == "skip_gain":
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
            else:
                assert_equal(p.grad, q.grad, f"{index} {name}")


@needs_kernels
def test_a_group_is_launched_once_forward_and_once_backward(launches):
    model, x = attached(net().to(DEVICE, torch.float32)), images(dtype=torch.float32).to(DEVICE)
    outcome(model, x, passes=1)
    assert launches == ["forward"] * 4 + ["backward"] * 4
    launches.clear()
    out = model(x)
    assert launches == ["forward_of_group"]
    out.square().sum().backward()
    assert launches == ["forward_of_group", "backward_of_group"]


@needs_kernels
@pytest.mark.slow
def test_a_step_launches_two_kernels_for_each_group_of_a_network(launches):
    torch.manual_seed(0)
    model = create_model("nf_resnet26", width=0.125, num_classes=3).to(DEVICE)
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    model(x)
    launches.clear()
    model(x).square().sum().backward()
    groups = len(model._weight_pass.plan.groups)
    assert sorted(launches) == ["backward_of_group"] * groups + ["forward_of_group"] * groups
    assert groups < len(scaled(model)) / 5


@needs_kernels
def test_a_network_computes_the_same_with_and_without_groups(launches):
    x = images(dtype=torch.float32).to(DEVICE)
    model = attached(net().to(DEVICE, torch.float32))
    ours = outcome(model, x)
    assert "backward_of_group" in launches
    detach(model)
    launches.clear()
    assert_same(ours, outcome(model, x), 1e-5)
    assert set(launches) == {"forward", "backward"}


@needs_kernels
def test_autocast_takes_rounded_weights_and_what_it_leaves_out_exact_ones(launches):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net().to(torch.float32)

        def forward(self, x):
            with torch.autocast(DEVICE, torch.bfloat16):
                x = self.body[:4](x)
            return self.body[4:](x.float())

    model, x = attached(Mixed().to(DEVICE)), images(dtype=torch.float32).to(DEVICE)
    first = outcome(model, x, passes=1)
    launches.clear()
    assert_same(outcome(model, x, passes=1), first, 1e-5)
    assert launches[:2] == ["forward_of_group", "forward"]  # the group is rounded: two layers compute their own


@needs_kernels
def test_shared_weights_are_launched_once_for_all_passes(launches):
    model, x = net().to(DEVICE, torch.float32), images(4, dtype=torch.float32).to(DEVICE)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    launches.clear()
    with shared_weights(model):
        for part in x.split(1):
            model(part).square().sum().backward()
    assert launches == ["forward_of_group", "backward_of_group"]
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


@needs_kernels
def test_copies_and_moved_tensors_are_found_where_they_are(launches):
    x = images(dtype=torch.float32).to(DEVICE)
    model = attached(net().to(DEVICE, torch.float32))
    outcome(model, x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.5
    launches.clear()
    assert_same(outcome(model, x), outcome(other, x))
    assert "forward_of_group" in launches


@needs_kernels
def test_losses_go_backward_one_after_the_other_and_changed_weights_are_refused(launches):
    layers = nn.ModuleList(group_of(torch.float32))

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return layers[0](x), layers[4](x[:, :2])

    model, x = attached(Both()), torch.randn(1, 5, 8, 8, device=DEVICE)
    model(x)
    launches.clear()
    for loss in model(x):
        loss.sum().backward()
    assert launches.count("forward_of_group") == 1
    assert launches.count("backward_of_group") == 2
    one, other = model(x)
    with torch.no_grad():
        layers[0].gain.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an in-place operation: of weights of shapes \(4, 5, 3, 3\)"):
        (one.sum() + other.sum()).backward()


@needs_kernels
def test_weights_that_are_computed_again_are_launched_by_layer(launches):
    model, x = attached(net().to(DEVICE, torch.float32)), images(dtype=torch.float32).to(DEVICE)
    recompute_weights(model)
    outcome(model, x)
    assert set(launches) == {"forward", "backward"}


@pytest.mark.skipif(INTERPRETED, reason="is compiled in a process that does not interpret")
@pytest.mark.parametrize("of_result", ["fp32", "bf16", "fp64"])
def test_they_compile_for_a_gpu_without_one(of_result):
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from normfree.nn import fused_kernels

    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp64": tl.float64}
    exact = "fp64" if of_result == "fp64" else "fp32"
    integers = {"table": "*i64", "layer_of_row": "*i32", "grads": "*i64", "fan_in": "i32"}
    results = dict.fromkeys(["w_eff", "b_eff", "grad_w_eff", "grad_b_eff"], f"*{of_result}")
    constants = {
        "dtype": types[exact], "of_scales": types[exact], "of_grads": types[of_result], "exact": types[exact],
        "eps": 1e-4, "block": 256, "has_bias": True, "has_skip": True,
    }  # fmt: skip
    for kernel in ("forward", "backward", "forward_of_group", "backward_of_group"):
        function = getattr(fused_kernels, kernel)
        names = function.arg_names
        signature = {
            name: "constexpr" if name in constants else (integers | results).get(name, f"*{exact}") for name in names
        }
        chosen = {(names.index(name),): value for name, value in constants.items() if name in names}
        source = ASTSource(fn=function, signature=signature, constexprs=chosen)
        assembly = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}).asm
        assert len(assembly["cubin"]) > 1000
        # The share of a SkipInit gain is written before, and read after, what counts the programs that have ended.
        assert ("atom.global.gpu.acq_rel.add" in assembly["ptx"]) == (kernel == "backward_of_group")


@pytest.mark.gpu
@pytest.mark.parametrize("times", [200])
def test_sums_of_shares_are_complete_on_a_gpu(times):
    from normfree.nn import fused

    assert ON_GPU
    layers = [ScaledWSConv2d(64, 512, 3, skip_gain=0.5).cuda() for _ in range(8)]
    found = []
    for _ in range(times):
        for layer in layers:
            layer.zero_grad()
        weighed(
            [
                t
                for both in fused.effective_parameters([layer.factors() for layer in layers], torch.float32)
                for t in both
            ]
        ).backward()
        found.append(torch.cat([layer.skip_gain.grad for layer in layers]))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.gpu
def test_a_step_is_captured_into_a_cuda_graph():
    torch.manual_seed(0)
    model = create_model("nf_resnet26", width=0.25, num_classes=3).cuda()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    expected = outcome(model, x)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x,))
    assert_same(outcome(graphed, x), expected, 1e-4)
