"""Characterization: what is measured, under which conditions, on which inputs."""

import copy
import dataclasses

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from normfree import SignalError, characterize, create_model
from normfree.trace.inputs import examples
from tests.helpers import Residual, X, residual_network


def test_batch_norm_shows_what_training_sees():
    model = residual_network()
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
    model = residual_network()
    for block in (model[1], model[3]):
        block.norm.running_var.fill_(100.0)
    unfrozen = characterize(model, X)[0].residual_variance
    for freeze in (lambda norm: norm.eval(), lambda norm: norm.requires_grad_(False)):
        frozen = copy.deepcopy(model)
        for block in (frozen[1], frozen[3]):
            freeze(block.norm)
        assert characterize(frozen, X)[0].residual_variance < 0.5 * unfrozen


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


def test_outputs_in_a_dataclass_have_gradients():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = residual_network()

        def forward(self, x):
            return Output(self.net(x))

    assert characterize(Net(), X, backward=True)[0].gradient_variance > 0


def test_every_kind_of_input_gives_the_same_report():
    model = residual_network()
    expected = characterize(model, X).to_dicts()
    loader = DataLoader(TensorDataset(X, torch.arange(4)), batch_size=4)
    for inputs in (X, (X,), {"input": X}, loader, lambda model: X):
        assert characterize(model, inputs).to_dicts() == expected


class TakesTwo(nn.Module):
    """A model of an image and a mask, by name."""

    def __init__(self):
        super().__init__()
        self.net = residual_network()

    def forward(self, image, mask=None):
        """Multiply."""
        return self.net(image if mask is None else image * mask)


def test_a_loader_of_dictionaries_gives_what_the_forward_takes():
    loader = DataLoader([{"image": x, "label": 1, "name": "a"} for x in X], batch_size=4)
    assert characterize(residual_network(), loader).to_dicts() == characterize(residual_network(), X).to_dicts()
    masked = DataLoader([{"image": x, "mask": torch.full((1, 16, 16), 2.0), "label": 1} for x in X], batch_size=4)
    expected = characterize(residual_network(), 2 * X).to_dicts()
    found = characterize(TakesTwo(), masked).to_dicts()
    assert [row["variance"] for row in found] == [row["variance"] for row in expected]
    with pytest.raises(TypeError, match="dictionaries of picture, label, and the forward of Sequential takes input"):
        characterize(residual_network(), DataLoader([{"picture": x, "label": 1} for x in X]))
    few = DataLoader([{"image": x, "mask": torch.ones(1, 16, 16)} for x in X], batch_size=1)
    assert examples(few, TakesTwo(), 3)["mask"].shape == (3, 1, 16, 16)


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
def test_inputs_that_cannot_be_used_are_refused_and_named(inputs, error, words):
    with pytest.raises(error, match=words):
        characterize(residual_network(), inputs)


def test_arguments_that_cannot_be_used_are_refused_and_named():
    with pytest.raises(ValueError, match="seeds is 0"):
        characterize(residual_network(), seeds=0)
    with pytest.raises(TypeError, match=r"model is 3; it must be torch's Module \| a function"):
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
        traced = torch.jit.trace(residual_network().eval(), X)
    with pytest.raises(ValueError, match="scripted or traced"):
        characterize(traced, X)
    with torch.device("meta"):
        empty = residual_network()
    with pytest.raises(ValueError, match="meta device"):
        characterize(empty, X)
    with pytest.raises(SignalError, match="larger batch"):
        characterize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), X[:1, :, :3, :3])


def test_not_a_number_inside_is_reported_with_its_place():
    model = residual_network()
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


def test_gradients_are_those_by_hand_and_leave_none_behind():
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
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []


def test_gradients_come_through_operations_in_place():
    report = characterize(torchvision.models.resnet18(), torch.randn(2, 3, 64, 64), backward=True)
    assert len(report) == 8
    assert min(record.gradient_variance for record in report) > 0


def test_the_gradient_of_a_branch_is_divided_by_its_scale():
    torch.manual_seed(0)
    block = create_model("nf_resnet26", width=0.5, skip_gain=0.5).stages[0][1]
    record = characterize(block, torch.randn(2, 32, 8, 8), backward=True)[0]
    assert record.gradient_residual_variance == pytest.approx(record.gradient_variance * 0.1**2, rel=1e-4)


def test_inference_mode_autocast_and_compilation_change_nothing():
    model = residual_network()
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


def test_a_classifier_that_starts_at_zero_is_no_fault():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    report = characterize(model, X)
    assert report[1].variance == 0
    assert not any("vanishes" in verdict and "neither" not in verdict for verdict in report.verdicts)


def test_complex_numbers_on_the_way_hide_no_join():
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
            self.net = residual_network()

        def forward(self, x):
            return self.net(x).detach()

    with pytest.raises(SignalError, match=r"^no output has a gradient"):
        characterize(Detached(), X, backward=True)


def test_models_of_half_precision_have_the_variance_of_the_exact():
    model = residual_network().bfloat16()
    assert characterize(model, X.bfloat16())[1].variance == pytest.approx(
        characterize(residual_network(), X)[1].variance, rel=0.05
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
    assert len(report) == 10
    assert model.training


@pytest.mark.gpu
def test_on_a_gpu_it_measures_what_it_does_on_a_cpu():
    model = residual_network().cuda()
    state = torch.cuda.get_rng_state()
    on_gpu, on_cpu = characterize(model, X), characterize(residual_network(), X)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.variance == pytest.approx(b.variance, rel=1e-3)
