"""Kinds of layers: what replaces linear ones and transposed convolutions, and which cannot be replaced."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize, prune

import normfree
from normfree.conversion import convert
from normfree.nn.scaled_layer import ScaledWS
from tests.helpers import assert_allclose, assert_equal, assert_gradients, assert_same_state


def moments(layer, images, model):
    """Mean and variance of the layer's channels, averaged."""
    seen = []
    handle = layer.register_forward_hook(
        lambda _, __, out: seen.append(out.detach().clone().movedim(layer.channel_axis, -1))
    )
    model.eval()(images)
    handle.remove()
    variance, mean = torch.var_mean(seen[0].flatten(0, -2), 0, correction=0)
    return mean.square().mean().item(), variance.mean().item()


class Generator(nn.Module):
    """From a vector to an image, through a linear layer whose output is seen as one."""

    def __init__(self):
        super().__init__()
        self.project, self.norm0 = nn.Linear(10, 8 * 4 * 4), nn.BatchNorm2d(8)
        self.up1, self.norm1 = nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2, bias=False), nn.BatchNorm2d(6)
        self.up2 = nn.ConvTranspose2d(6, 3, 4, 2, 1)

    def forward(self, z):
        x = self.norm0(self.project(z).view(-1, 8, 4, 4)).relu()
        return self.up2(self.norm1(self.up1(x)).relu()).tanh()


class Projector(nn.Module):
    """A residual block of linear layers on sequences, normalized over channels as BatchNorm1d has them."""

    def __init__(self):
        super().__init__()
        self.into, self.norm0 = nn.Linear(10, 20), nn.BatchNorm1d(20)
        self.out, self.norm1 = nn.Linear(20, 10, bias=False), nn.BatchNorm1d(10)

    def forward(self, x):
        hidden = self.norm0(self.into(x).transpose(1, 2)).transpose(1, 2).relu()
        return x + self.norm1(self.out(hidden).transpose(1, 2)).transpose(1, 2)


class UNet(nn.Module):
    """One level of a U-Net."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.last = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
                                  nn.Conv2d(8, 2, 1))  # fmt: skip

    def forward(self, x):
        x = self.down(x)
        return self.last(torch.cat([x, self.up(self.deep(x))], 1))


@pytest.mark.parametrize(
    ("model", "shape", "layers"),
    [
        (Generator, (64, 10), {"project": "ScaledWSLinear", "up1": "ScaledWSConvTranspose2d"}),
        (Projector, (16, 7, 10), {"into": "ScaledWSLinear", "out": "ScaledWSLinear"}),
        (UNet, (8, 3, 16, 16), {"down.0": "ScaledWSConv2d", "up.0": "ScaledWSConvTranspose2d"}),
    ],
)
def test_linear_layers_and_transposed_convolutions_are_replaced_with_their_signal(model, shape, layers):
    torch.manual_seed(0)
    inputs = torch.randn(shape)
    conversion = convert(model(), inputs)
    free = conversion.model
    assert not conversion.kept
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in free.modules())
    for path, kind in layers.items():
        layer = free.get_submodule(path)
        assert type(layer).__name__ == kind
        mean, variance = moments(layer, inputs, free)
        expected = layer.out_scale.item() ** 2
        assert variance == pytest.approx(expected, rel=0.03), f"var={variance:.3f} at {path}, expected {expected}"
        if path != "project":  # the others have biases of a normalizer's, or none
            assert mean < 1e-6 + 0.05 * expected * (layer.bias is None), f"squared mean {mean:.2g} at {path}"
    out = free.train()(inputs)
    out.square().mean().backward()
    assert_gradients(free)
    folded = normfree.fold(free)
    assert not any(isinstance(m, ScaledWS) for m in folded.modules())
    assert_allclose(folded(inputs), out, atol=1e-5)


def test_a_residual_branch_may_end_in_a_linear_layer():
    free = convert(Projector(), torch.randn(16, 7, 10)).model
    assert free.out.skip_gain.item() == 1
    assert free.into.skip_gain is None


def test_scale_and_shift_of_other_channels_are_lost_and_said_to_be():
    model = Generator()
    with torch.no_grad():
        model.norm0.weight.fill_(2)
        model.norm1.weight.fill_(3)
    conversion = convert(model, torch.randn(64, 10))
    notes = {change.path: change.note for change in conversion.changes}
    assert notes["norm0"] == "its scale and shift are lost: no single layer can carry them"
    assert notes["norm1"] == ""
    assert_equal(conversion.model.up1.gain, model.norm1.weight)


@pytest.mark.parametrize("kind", ["columns", "positions"])
def test_scale_and_shift_of_another_axis_are_lost_however_long_it_is(kind):
    if kind == "columns":
        model, images = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm(8)), torch.randn(4, 3, 8, 8)
    else:
        model, images = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), torch.randn(6, 8, 4)
    with torch.no_grad():
        model[1].weight.uniform_(1, 2)
    conversion = convert(model, images, norms=("batch", "layer"))
    assert conversion.changes[1].note == "its scale and shift are lost: no single layer can carry them"
    assert_equal(conversion.model[0].gain.detach(), torch.ones(8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantized_layers_stay():
    from torch.ao import quantization

    head = [nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5), nn.BatchNorm1d(5)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *head).eval()
    quantized = quantization.quantize_dynamic(model, {nn.Linear})
    conversion = convert(quantized, torch.randn(8, 3, 8, 8))
    (change,) = conversion.kept
    assert change.path == "5"
    assert "normalizes the output of 4: it is quantized (torch.ao.nn.quantized.dynamic" in change.note
    assert isinstance(conversion.model[0], ScaledWS)
    model.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with pytest.raises(ValueError, match=r"1: normalizes the output of 0: it is quantized \(torch.ao.nn.qat"):
        convert(quantization.prepare_qat(model), torch.randn(8, 3, 8, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("fused", "why"), [(False, r"\(conv1 is quantized: "), (True, r"\(it has no such normalizer; conv1 is quantized: ")]
)
def test_a_network_that_is_quantized_altogether_is_refused(fused, why, monkeypatch):
    from torch.ao import quantization

    monkeypatch.setattr(torch.backends.quantized, "engine", torch.backends.quantized.supported_engines[-1])
    model = torchvision.models.quantization.resnet18(weights=None, quantize=False).eval()
    if fused:
        model.fuse_model()
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    images = torch.randn(2, 3, 64, 64)
    quantization.prepare(model, inplace=True)(images)
    quantization.convert(model, inplace=True)
    with pytest.raises(ValueError, match="nothing in QuantizableResNet can be converted " + why):
        convert(model, images)


def test_lazy_layers_are_refused_until_they_have_run():
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    images = torch.randn(8, 3, 8, 8)
    with pytest.raises(ValueError, match=r"0\.weight is not initialized yet: run the model once"):
        convert(lazy, images)
    lazy(images)
    assert not convert(lazy, images).kept


class Scaled(nn.Module):
    """Residual blocks whose branches begin closed by a LayerScale."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.gamma = nn.ParameterList(torch.full((8, 1, 1), 1e-6) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for conv, norm, gamma in zip(self.convs, self.norms, self.gamma, strict=True):
            x = x + gamma * conv(norm(x).relu())
        return x


def test_branches_that_a_layer_scale_closes_are_calibrated_open():
    torch.manual_seed(0)
    model, images = Scaled(), torch.randn(8, 3, 16, 16)
    conversion = convert(model, images)
    for gamma in conversion.model.gamma:
        assert_equal(gamma.detach(), torch.full((8, 1, 1), 1e-6))
    # The last convolution is followed by no normalizer: it is as it was.
    assert len(conversion.after) == 3
    for record in list(conversion.after)[:2]:
        assert record.residual_variance == pytest.approx(1, rel=0.02), f"{record.residual_variance:.3f}, expected 1"


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: torchvision.models.video.r3d_18(num_classes=5), (2, 3, 4, 32, 32)),
        (lambda: torchvision.models.segmentation.deeplabv3_resnet50(weights_backbone=None, num_classes=5),
         (2, 3, 64, 64)),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(torchvision.models.resnet18(num_classes=5)), (4, 3, 64, 64)),
    ],
    ids=["r3d_18", "deeplabv3_resnet50", "SyncBatchNorm"],
)  # fmt: skip
def test_videos_segmentation_and_synchronized_normalizers_are_converted(make, shape):
    torch.manual_seed(0)
    conversion = convert(make(), torch.randn(shape), inplace=True)
    assert not conversion.kept
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in conversion.model.modules())
    out = conversion.model.train()(torch.randn(1, *shape[1:]))  # one image at a time
    (out["out"] if isinstance(out, dict) else out).square().mean().backward()
    assert_gradients(conversion.model)


def test_a_detector_with_frozen_normalizers_is_converted_and_trains():
    """torchvision's detector as it comes with weights: frozen BatchNorm, and feature pyramids without normalizers."""
    torch.manual_seed(0)
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=96
    )
    for path, module in list(detector.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, name = path.rpartition(".")
            setattr(detector.get_submodule(parent), name, torchvision.ops.FrozenBatchNorm2d(module.num_features))
    conversion = convert(detector, [torch.rand(3, 64, 96), torch.rand(3, 80, 64)], inplace=True)
    assert not conversion.kept
    assert not any("BatchNorm" in type(m).__name__ for m in conversion.model.modules())
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    losses = conversion.model.train()([torch.rand(3, 64, 96)], targets)
    assert losses.keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.isfinite() for loss in losses.values()), losses


class MaxNorm(nn.Module):
    """Bound of each filter's norm."""

    def forward(self, weight):
        """Bound."""
        return weight.renorm(2, 0, 1.0)


@pytest.mark.parametrize("keep", ["weights", "function"])
def test_a_weight_that_is_only_bounded_is_converted_and_stays_bounded(keep, tmp_path):
    def network():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        net[0].weight.data.mul_(10)
        parametrize.register_parametrization(net[0], "weight", MaxNorm())
        return net.eval()

    images = torch.randn(8, 3, 8, 8)
    original = network()
    conversion = convert(original, images, keep=keep)
    free = conversion.model
    assert not conversion.kept
    assert parametrize.is_parametrized(free[0], "weight")
    assert_allclose(free[0].weight, original[0].weight, atol=0)
    if keep == "function":
        assert_allclose(free(images), original(images), atol=1e-6)
    folded = normfree.fold(free)
    assert type(folded[0]) is nn.Conv2d
    assert_allclose(folded(images), free(images), atol=1e-6)
    free.train()(images[:1]).square().sum().backward()
    assert free[0].parametrizations.weight.original.grad.abs().sum() > 0
    again = normfree.load_converted(network(), conversion.save(tmp_path / "c.safetensors"))
    assert_allclose(again(images), free(images), atol=1e-6)


WRAPPED = {
    "weight_norm": nn.utils.weight_norm,
    "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", WRAPPED)
def test_a_weight_that_is_computed_keeps_its_normalizer_and_the_remedy_is_named(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    WRAPPED[name](model[2])
    images = torch.randn(4, 3, 8, 8)
    model(images)
    before = copy.deepcopy(model.state_dict())
    (kept,) = convert(model, images).kept
    assert_same_state(model.state_dict(), before)
    assert kept.path == "3"
    assert "its weight is computed from others: make it a parameter first (parametrize.remove" in kept.note
