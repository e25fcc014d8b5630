"""What is measured under which conditions, and that the model comes back as it was."""

import copy
import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils.data import DataLoader, TensorDataset

from normfree import SignalError, characterize, create_model


class Residual(nn.Module):
    def __init__(self, channels, gain=None):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gain = None if gain is None else nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        out = self.conv(F.relu(self.norm(x)))
        return x + (out if self.gain is None else out * self.gain)


def network(**arguments):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Residual(8, **arguments), nn.Dropout(0.5), Residual(8, **arguments)
    )


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def snapshot(model):
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "global hooks": (len(module_hooks._global_forward_hooks), len(module_hooks._global_forward_pre_hooks)),
        "buffers": [name for name, _ in model.named_buffers()],
        "rng": torch.get_rng_state(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_unchanged(before, model):
    for key, value in snapshot(model).items():
        if isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            for name, tensor in value.items():
                same = tensor is None or torch.equal(tensor, before[key][name])
                assert same, f"{key}: {name} has changed"
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, before[key]), f"{key} has changed"
        else:
            assert value == before[key], f"{key} has changed"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batch_stats", [False, True])
def test_the_model_comes_back_as_it_was(backward, batch_stats):
    model = network(gain=0.0)
    model[1].norm.eval()
    model[1].norm.weight.requires_grad_(False)
    x = X.clone()
    before = snapshot(model)
    characterize(model, x, backward=backward, batch_stats=batch_stats)
    assert_unchanged(before, model)
    assert torch.equal(x, X)
    assert not x.requires_grad


def test_also_when_its_forward_raises():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("boom")

    model = nn.Sequential(*network(gain=0.0), nn.Sequential(Failing()))
    before = snapshot(model)
    with pytest.raises(SignalError, match=r"last module reached was 4\.0 \(Failing\): boom"):
        characterize(model, X)
    assert_unchanged(before, model)


def test_also_when_it_is_interrupted():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(*network(gain=0.0), Interrupted())
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        characterize(model, X)
    assert_unchanged(before, model)


def test_inputs_that_a_model_overwrites_come_back():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x.sub_(1)
            return x + self.conv(x)

    x = X.clone()
    for backward in (False, True):
        characterize(Overwrites(), x, backward=backward)
        assert torch.equal(x, X)


def test_batch_norm_shows_what_training_sees():
    model = network()
    trained = copy.deepcopy(model).train()
    trained[2].eval()
    with torch.no_grad():
        out = trained(X)
    expected = out.var((0, 2, 3), correction=0).mean().item()
    assert characterize(model.eval(), X)[1].variance == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        running = model(X).var((0, 2, 3), correction=0).mean().item()
    assert characterize(model, X, batch_stats=False)[1].variance == pytest.approx(running, rel=1e-4)
    assert running != pytest.approx(expected, rel=1e-2)


def test_frozen_batch_norm_keeps_its_running_statistics():
    model = network()
    for block in (model[1], model[3]):
        block.norm.running_var.fill_(100.0)
    unfrozen = characterize(model, X)[0].residual_variance
    for freeze in (lambda norm: norm.eval(), lambda norm: norm.requires_grad_(False)):
        frozen = copy.deepcopy(model)
        for block in (frozen[1], frozen[3]):
            freeze(block.norm)
        assert characterize(frozen, X)[0].residual_variance < 0.5 * unfrozen


def test_closed_branches_are_opened_and_named():
    model = network(gain=0.0)
    with torch.no_grad():
        model[3].norm.weight.zero_()
    report = characterize(model, X)
    assert set(report.opened) == {"1.gain", "3.gain", "3.norm.weight"}
    assert report[0].variance > report[0].residual_variance > 0


def test_left_closed_the_residual_variance_comes_from_an_opened_run():
    model = network(gain=0.0)
    opened, closed = characterize(model, X), characterize(model, X, open_branches=False)
    assert closed.opened == ()
    assert closed[0].residual_variance == pytest.approx(opened[0].residual_variance, rel=1e-5)
    with torch.no_grad():
        stem = model[0](X).var((0, 2, 3), correction=0).mean().item()
    assert closed[0].variance == pytest.approx(stem, rel=1e-5)


def test_layer_scale_is_found_by_what_it_does():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.whatever = nn.Parameter(torch.full((3,), 1e-5))

        def forward(self, x):
            return x + self.conv(x) * self.whatever[:, None, None]

    model = Scaled()
    report = characterize(model, X)
    assert report.opened == ("whatever",)
    with torch.no_grad():
        expected = model.conv(X).var((0, 2, 3), correction=0).mean().item()
    assert report[0].residual_variance == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        model.whatever.copy_(torch.tensor([0.1, 0.2, 0.3]))  # training has moved it
    assert characterize(model, X).opened == ()


def test_gains_that_training_has_moved_stay():
    model = network(gain=-0.3)
    assert characterize(model, X).opened == ()


def test_opened_parameters_may_share_memory():
    model = network(gain=0.0)
    shared = torch.zeros(1)
    model[1].gain.data = shared.expand(3)[0]
    characterize(model, X)
    assert model[1].gain.item() == 0
    assert shared.item() == 0


def test_a_scale_that_the_block_applies_itself_is_counted_once():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.register_buffer("out_scale", torch.tensor(0.2))

        def forward(self, x):
            return x + self.out_scale * F.relu(self.conv(x))

    model = Scaled()
    with torch.no_grad():
        expected = F.relu(model.conv(X)).var((0, 2, 3), correction=0).mean().item()
    assert characterize(model, X)[0].residual_variance == pytest.approx(expected, rel=1e-4)


def test_norms_that_multiply_by_one_plus_weight_are_left_alone():
    class PlusOneRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-6
            self.weight = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    model = nn.Sequential(PlusOneRMSNorm(), nn.Linear(16, 16))
    assert characterize(model, torch.randn(4, 5, 16)).opened == ()


def test_our_branches_are_divided_by_the_scales_they_declare():
    for se_ratio in (0.0, 0.25):
        torch.manual_seed(0)
        model = create_model("nf_resnet26", width=1, se_ratio=se_ratio, skip_gain=0.5)
        block, x = model.stages[0][1], torch.randn(4, 64, 16, 16)
        record = characterize(block, x)[0]
        with torch.no_grad():
            branch = (block.eval()(x) - x) / (0.2 * 0.5)
        assert record.residual_variance == pytest.approx(branch.var((0, 2, 3), correction=0).mean().item(), rel=1e-4)
        assert record.expected_variance == pytest.approx(1.08)


def test_zero_convolutions_cannot_be_opened():
    model = network()
    with torch.no_grad():
        model[3].conv.weight.zero_()
        model[3].conv.bias.zero_()
    report = characterize(model, X)
    assert report.closed == ["3"]
    assert any("cannot be opened" in verdict for verdict in report.verdicts)


def test_seeds_redraw_the_noise_of_a_module_and_the_parameters_of_a_factory():
    model = create_model("nf_resnet26", width=0.25)
    of_module = characterize(model, seeds=3)
    of_factory = characterize(lambda: create_model("nf_resnet26", width=0.25), seeds=3)
    assert of_module.seeds == of_factory.seeds == 3
    assert len(of_module[0].samples["variance"]) == 3
    assert 0 < of_module[0].std("variance") < of_factory[0].std("variance")
    again = characterize(lambda: create_model("nf_resnet26", width=0.25), seeds=3)
    assert again.to_dicts() == of_factory.to_dicts()
    with pytest.raises(ValueError, match="neither this model nor these inputs are drawn"):
        characterize(model, X, seeds=2)


def test_one_tensor_given_twice_is_one_tensor():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, a, b):
            return a + self.conv(b)

    assert characterize(Twice(), (X, X)).kind == "join"
    assert characterize(Twice(), (X, X), backward=True).kind == "join"


def test_outputs_in_a_dataclass():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return Output(self.net(x))

    assert characterize(Net(), X, backward=True)[0].gradient_variance > 0


def test_every_kind_of_input():
    model = network()
    expected = characterize(model, X).to_dicts()
    loader = DataLoader(TensorDataset(X, torch.arange(4)), batch_size=4)
    for inputs in (X, (X,), {"input": X}, loader, lambda model: X):
        assert characterize(model, inputs).to_dicts() == expected


def test_noise_has_the_declared_size():
    assert characterize(timm.create_model("test_resnet")).inputs == "4×3×160×160"
    assert characterize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())).inputs == "4×1×224×224"
    assert characterize(nn.Sequential(nn.Linear(20, 4), nn.ReLU())).inputs == "4×20"


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ("images", TypeError, "no tensor"),
        (torch.empty(0, 3, 8, 8), ValueError, "empty tensor"),
        (torch.full((1, 3, 8, 8), float("nan")), ValueError, "NaN"),
        (torch.randn(2, 5, 8, 8), SignalError, r"last module reached was 0 \(Conv2d\)"),
        (DataLoader(TensorDataset(X[:0])), ValueError, "DataLoader is empty"),
    ],
)
def test_inputs_that_cannot_be_used(inputs, error, words):
    with pytest.raises(error, match=words):
        characterize(network(), inputs)


def test_arguments_that_cannot_be_used():
    with pytest.raises(ValueError, match="seeds is 0"):
        characterize(network(), seeds=0)
    with pytest.raises(TypeError, match="model is a int"):
        characterize(3)
    with pytest.raises(TypeError, match="factory returned a int"):
        characterize(lambda: 3)
    with pytest.raises(SignalError, match="no weight layer"):
        characterize(nn.ReLU(), X)
    with pytest.raises(ValueError, match="does not say what its input looks like"):
        characterize(nn.ReLU())
    with pytest.raises(ValueError, match="not initialized yet"):
        characterize(nn.Sequential(nn.LazyConv2d(3, 1)), X)
    with pytest.warns(FutureWarning, match="deprecated"):
        traced = torch.jit.trace(network().eval(), X)
    with pytest.raises(ValueError, match="scripted or traced"):
        characterize(traced, X)
    with torch.device("meta"):
        empty = network()
    with pytest.raises(ValueError, match="meta device"):
        characterize(empty, X)
    with pytest.raises(SignalError, match="larger batch"):
        characterize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), X[:1, :, :3, :3])


def test_not_a_number_inside_is_reported_with_its_place():
    model = network()
    with torch.no_grad():
        model[3].conv.weight[0, 0] = float("nan")
    report = characterize(model, X)
    assert any("not finite from 3 on" in verdict for verdict in report.verdicts)
    with pytest.raises(SignalError, match="not finite from 3 on"):
        report.check()


def test_a_model_without_joins_gets_a_record_per_weight_layer():
    report = characterize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(720, 2)), X
    )
    assert [record.name for record in report] == ["0", "2", "4"]
    assert report.kind == "weight layer"
    assert "no residual joins" in report.verdicts[0]
    assert [record.shortcut for record in report] == ["none"] * 3


def test_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Residual(6), nn.Conv2d(6, 2, 1)).double().eval()
    x = X.double()
    report = characterize(model, x, backward=True, batch_stats=False)
    # By hand, with the cotangent that the same seed draws after the run.
    torch.manual_seed(0)
    join = model[1](model[0](x)).detach().requires_grad_()
    out = model[2](join)
    (gradient,) = torch.autograd.grad(out, join, torch.randn_like(out))
    assert report[0].gradient_variance == pytest.approx(gradient.var((0, 2, 3), correction=0).mean().item(), rel=1e-9)
    assert report[0].gradient_squared_mean == pytest.approx(gradient.mean((0, 2, 3)).square().mean().item(), rel=1e-9)
    assert report[0].gradient_residual_variance == pytest.approx(report[0].gradient_variance)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_through_operations_in_place():
    report = characterize(torchvision.models.resnet18(), torch.randn(2, 3, 64, 64), backward=True)
    assert len(report) == 8
    assert all(record.gradient_variance > 0 for record in report)


def test_gradient_of_a_scaled_branch():
    torch.manual_seed(0)
    block = create_model("nf_resnet26", width=0.5, skip_gain=0.5).stages[0][1]
    record = characterize(block, torch.randn(2, 32, 8, 8), backward=True)[0]
    assert record.gradient_residual_variance == pytest.approx(record.gradient_variance * 0.1**2, rel=1e-4)


def test_inference_mode_autocast_and_compiled_models():
    model = network()
    expected = characterize(model, X)
    with torch.inference_mode():
        inside = characterize(model, X.clone())
    assert inside.to_dicts() == expected.to_dicts()
    compiled = characterize(torch.compile(model), X)
    assert compiled.to_dicts() == expected.to_dicts()
    with torch.autocast("cpu", torch.bfloat16):
        half = characterize(model, X)
    assert [r.name for r in half] == [r.name for r in expected]
    assert half[1].variance == pytest.approx(expected[1].variance, rel=0.02)


def test_complex_numbers_on_the_way():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            mixed = torch.fft.fft(x) * 1j * torch.tensor(2 + 1j)
            return x + self.linear(mixed.real)

    assert [record.name for record in characterize(Fourier(), torch.randn(4, 5, 16))] == ["Fourier"]


def test_backward_needs_an_output_with_a_gradient():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x).detach()

    with pytest.raises(SignalError, match=r"^no output has a gradient"):
        characterize(Detached(), X, backward=True)


def test_half_precision_models():
    model = network().bfloat16()
    assert characterize(model, X.bfloat16())[1].variance == pytest.approx(
        characterize(network(), X)[1].variance, rel=0.05
    )


def test_the_transformer_s_fast_path_hides_nothing():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    report = characterize(model, torch.randn(2, 5, 16))
    assert [record.name for record in report] == ["layers.0", "layers.0#2", "layers.1", "layers.1#2"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_detectors_ask_for_no_targets():
    model = torchvision.models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None)
    report = characterize(model.train(), [torch.rand(3, 96, 96), torch.rand(3, 80, 100)])
    assert len(report) > 5
    assert model.training


def test_memory_does_not_grow_with_depth():
    """A run keeps no activation: the tape holds numbers."""
    import weakref

    alive = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            out = x + self.conv(x)
            alive.append(weakref.ref(out))
            counts.append(sum(reference() is not None for reference in alive))
            return out

    counts = []
    characterize(nn.Sequential(nn.Conv2d(3, 8, 1), *(Watched() for _ in range(10))), X)
    assert max(counts) <= 2, f"{max(counts)} activations were alive at once"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    model = network().cuda()
    state = torch.cuda.get_rng_state()
    on_gpu, on_cpu = characterize(model, X), characterize(network(), X)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.variance == pytest.approx(b.variance, rel=1e-3)
