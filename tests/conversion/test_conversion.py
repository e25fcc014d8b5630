"""Conversion of other people's networks: no normalizers, and the signal that they gave."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normfree
from normfree.conversion import convert, load_converted
from normfree.nn import ChannelAffine
from normfree.nn.scaled_layer import ScaledWS
from normfree.optim import param_groups
from tests.helpers import assert_allclose, assert_equal, assert_gradients, assert_same_state, seeded

IMAGES = torch.randn(8, 3, 64, 64, generator=seeded(0))


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def build(name):
    torch.manual_seed(1)
    source, _, model = name.partition(":")
    if source == "timm":
        return timm.create_model(model, num_classes=10)
    return torchvision.models.get_model(model, weights=None, num_classes=10)


FAMILIES = [
    "timm:resnet26", "timm:seresnet33ts", "timm:resnetv2_50", "timm:regnety_002", "timm:efficientnet_b0",
    "timm:mobilenetv3_small_100", "timm:dla34", "timm:res2net50_26w_4s", "timm:xception41", "timm:resnest14d",
    "timm:ghostnet_100", "timm:skresnet18", "timm:mixnet_s", "timm:dpn48b", "torchvision:mobilenet_v2",
    "torchvision:resnext50_32x4d",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_every_family_are_free_of_normalizers_with_their_signal_and_train(name):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    conversion = convert(model, IMAGES)
    assert norms(model)
    assert_same_state(model.state_dict(), before)
    assert not norms(conversion.model)
    assert not conversion.kept
    assert conversion.departure < 0.03, f"branches are {conversion.departure:.3f} off"
    assert len(conversion.after) > 0
    for record in conversion.after:
        assert 0.25 < record.variance < 4, (
            f"var={record.variance:.3f} at {record.name}, expected 1.04 and a little more"
        )
    out = conversion.model.train()(IMAGES)
    out.square().mean().backward()
    assert_gradients(conversion.model)


@pytest.mark.parametrize("name", ["timm:resnetv2_50", "ours"])
def test_a_residual_stream_is_not_overwritten(name):
    """In-place activations stood on a normalizer's output; without it they would stand on the stream."""
    model = normfree.create_model("bn_resnet26", width=0.5) if name == "ours" else build(name)
    if name == "ours":
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
    after = list(convert(model, IMAGES).after)
    assert len(after) == (8 if name == "ours" else 16)
    expected = 1.0
    for previous, record in zip([None, *after[:-1]], after, strict=True):
        first = previous is None or record.stage != previous.stage
        expected = (1.0 if first else expected) + 0.04
        # The last block's variance follows the ledger's to a few percent, since every input is measured.
        assert record.variance == pytest.approx(expected, rel=0.05), f"var={record.variance:.3f} at {record.name}"


def test_an_image_knows_nothing_of_its_neighbours():
    model = convert(build("torchvision:resnet18").double(), IMAGES.double()).model.train()
    images = IMAGES[:4].double()
    together = model(images)
    assert_allclose(together[1:2], model(images[1:2]), atol=1e-10)
    labels = torch.arange(4)

    def gradients(images, labels):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradients(images, labels)
    alone = [gradients(images[i : i + 1], labels[i : i + 1]) for i in range(4)]
    difference = (whole - torch.stack(alone).mean(0)).abs().max()
    assert difference < 1e-5 * whole.abs().max(), f"{difference:.1e} of {whole.abs().max():.1e}"


def test_scale_and_shift_become_gain_and_bias():
    model = build("torchvision:resnet18")
    block = model.layer1[0]
    with torch.no_grad():
        block.bn1.weight.uniform_(0.5, 2)
        block.bn1.bias.uniform_(-1, 1)
        block.bn2.weight.zero_()
        model.layer2[0].downsample[1].weight.requires_grad_(False)
    converted = convert(model, IMAGES).model
    layer = converted.layer1[0].conv1
    assert_equal(layer.gain, block.bn1.weight)
    factor = layer.weight / block.conv1.weight
    assert_allclose(factor, factor.flatten()[0].expand_as(factor), rtol=1e-4)
    filters = layer.weight.flatten(1) - layer.weight.flatten(1).mean(1, keepdim=True)
    assert filters.square().sum(1).mean().item() == pytest.approx(1, abs=1e-5)
    assert layer.skip_gain is None
    end = converted.layer1[0].conv2
    assert end.skip_gain.item() == 0
    assert end.out_scale.item() == pytest.approx(0.2)
    assert converted.layer1[1].conv2.skip_gain.item() == 1
    assert converted.layer2[0].downsample[0].skip_gain is None
    assert not converted.layer2[0].downsample[0].gain.requires_grad
    # What a normalizer would return: its shift as mean, the square of its scale as variance.
    outputs = []
    layer.register_forward_hook(lambda _, __, out: outputs.append(out.detach().clone()))
    converted.eval()(IMAGES)
    variance = outputs[0].var((0, 2, 3), correction=0)
    assert variance.mean() == pytest.approx(block.bn1.weight.square().mean().item(), rel=0.02)
    assert_allclose(outputs[0].mean((0, 2, 3)), block.bn1.bias, atol=1e-4)


class Small(nn.Module):
    """A plain network of the user's, with what the arguments ask for."""

    def __init__(self, dims=2, before=False, functional=False, twice=False):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.first = norm(4) if before else nn.Identity()
        self.conv1, self.norm1 = conv(4, 8, 3, padding=1), norm(8)
        self.conv2, self.norm2 = conv(8, 8, 3, padding=1, bias=False), norm(8)
        self.functional, self.twice = functional, twice
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm1(self.conv1(self.first(x))).relu_()
        for _ in range(1 + self.twice):
            weight = self.conv2.weight
            y = F.conv2d(x, weight, padding=1) if self.functional else self.conv2(x)
            x = x + self.norm2(y).relu_()
        return self.out(x.flatten(2).mean(2))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_networks_of_every_dimension_are_converted(dims):
    conversion = convert(Small(dims), torch.randn(16, 4, *[8] * dims))
    assert not norms(conversion.model)
    assert conversion.after[0].residual_variance == pytest.approx(0.04, rel=0.02)  # α², for the branch ends in a ReLU
    conversion.model(torch.randn(1, 4, *[8] * dims)).square().sum().backward()
    assert_gradients(conversion.model)


def test_a_module_used_twice_gets_one_scale():
    torch.manual_seed(0)
    conversion = convert(Small(twice=True), torch.randn(16, 4, 8, 8))
    variances = []

    def measure(_, __, out):
        variances.append(out.relu().var((0, 2, 3), correction=0).mean().item())

    conversion.model.conv2.register_forward_hook(measure)
    torch.manual_seed(3)
    conversion.model.eval()(torch.randn(64, 4, 8, 8))
    assert len(variances) == 2
    mean = sum(variances) / 2
    assert mean == pytest.approx(0.04, rel=0.1), f"mean variance {mean:.4f}, expected α² = 0.04 where the branches join"


def test_normalizers_that_stay_are_named_with_the_reason():
    kept = {c.path: c.note for c in convert(Small(before=True), torch.randn(8, 4, 8, 8)).kept}
    assert kept == {"first": "no weight layer before it: it normalizes the network's input"}
    kept = {c.path: c.note for c in convert(Small(functional=True), torch.randn(8, 4, 8, 8)).kept}
    assert list(kept) == ["norm2"]
    assert "functional call" in kept["norm2"]
    conversion = convert(build("torchvision:resnet18"), IMAGES, exclude=["layer4", "layer1.0.*1"])
    assert {c.path.split(".")[0] for c in conversion.kept} == {"layer1", "layer4"}
    assert len(conversion.kept) == 6
    assert isinstance(conversion.model.layer4[0].conv1, nn.Conv2d)
    assert not isinstance(conversion.model.layer4[0].conv1, ScaledWS)
    for parametrize in (nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm):
        weighted = nn.Sequential(parametrize(nn.Conv2d(4, 8, 3)), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3),
                                 nn.BatchNorm2d(8))  # fmt: skip
        conversion = convert(weighted, torch.randn(8, 4, 8, 8))
        (change,) = conversion.kept
        assert change.path == "1"
        assert change.note.startswith("normalizes the output of 0: its weight is computed from others: make it")
        assert "kept     1  BatchNorm2d" in str(conversion)


def test_frozen_normalizers_become_frozen_gains_and_detectors_train():
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    converted = convert(backbone, IMAGES)
    assert not any(isinstance(m, torchvision.ops.FrozenBatchNorm2d) for m in converted.model.modules())
    assert not converted.model.conv1.gain.requires_grad
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    images = [torch.rand(3, 80, 64), torch.rand(3, 64, 96)]
    free = convert(detector, images).model
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm | torchvision.ops.FrozenBatchNorm2d)
                   for m in free.modules())  # fmt: skip
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    losses = free.train()(images, targets)
    assert losses.keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.isfinite() for loss in losses.values()), losses


def test_saved_and_loaded_it_is_the_same(tmp_path):
    conversion = convert(build("timm:resnetv2_50"), IMAGES)
    path = conversion.save(tmp_path / "free.safetensors")
    again = load_converted(build("timm:resnetv2_50"), path)
    expected = conversion.model.eval()(IMAGES)
    assert_equal(again.eval()(IMAGES), expected, "loaded")
    for copied in (copy.deepcopy(conversion.model), pickle.loads(pickle.dumps(conversion.model))):
        assert_equal(copied(IMAGES), expected, "copied")
    folded = normfree.fold(conversion.model)(IMAGES)
    assert_allclose(folded, expected, atol=1e-4, what="folded")
    with pytest.raises(ValueError, match="is no conversion of a ResNet"):
        load_converted(build("torchvision:resnet18"), path)
    other = timm.create_model("resnetv2_50", num_classes=5)
    with pytest.raises(ValueError, match=r"head\.fc\.weight is \(10, .* there and \(5, .* here"):
        load_converted(other, path)
    assert any(isinstance(module, nn.BatchNorm2d) for module in other.modules())
    with pytest.raises(ValueError, match=r"suffix must be \.safetensors"):
        conversion.save(tmp_path / "free.pt")
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"other\.safetensors is no \.safetensors file"):
        load_converted(build("torchvision:resnet18"), tmp_path / "other.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no conversion: it has tensors, but no plan"):
        load_converted(build("torchvision:resnet18"), tmp_path / "other.safetensors")


def test_it_exports_as_the_original_did():
    model = convert(build("torchvision:resnet18").eval(), IMAGES).model
    assert not model.training
    program = torch.export.export(model, (IMAGES,)).module()
    assert_allclose(program(IMAGES), model(IMAGES), atol=1e-4)


def test_images_may_come_from_a_loader_and_the_model_be_changed_in_place():
    model = build("torchvision:resnet18")
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(8)), batch_size=3)
    conversion = convert(model, loader, inplace=True)
    assert conversion.model is model
    assert conversion.before.inputs == "8×3×64×64"


def test_depthwise_filters_may_keep_their_mean():
    layers = [m for m in convert(build("torchvision:mobilenet_v2"), IMAGES, depthwise="scale").model.modules()
              if isinstance(m, ScaledWS)]  # fmt: skip
    assert {layer.standardize for layer in layers if layer.groups > 1} == {False}
    assert {layer.standardize for layer in layers if layer.groups == 1} == {True}


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "torchvision:mobilenet_v2", "timm:seresnet33ts", "timm:dla34", "timm:regnety_002"]
)
def test_what_a_trained_network_computes_can_be_kept(name, tmp_path):
    model = build(name).double()
    generator = torch.Generator().manual_seed(0)
    for norm in norms(model):
        for values, low, high in (
            (norm.weight, -0.5, 1.5), (norm.bias, -0.5, 0.5), (norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 2)
        ):  # fmt: skip
            nn.init.uniform_(values, low, high, generator=generator)
    images = IMAGES.double()
    conversion = convert(model, images, keep="function")
    assert not norms(conversion.model)
    with torch.no_grad():
        expected, found = model.eval()(images), conversion.model.eval()(images)
        assert_allclose(found, expected, atol=1e-9 * expected.std().item())
        again = load_converted(build(name).double(), conversion.save(tmp_path / "kept.safetensors")).eval()
        assert_equal(again(images), found, "loaded")
    conversion.model.train()(images[:1]).sum().backward()
    assert_gradients(conversion.model)


def test_what_no_layer_can_do_an_affine_map_does_where_the_function_is_kept():
    conversion = convert(build("timm:resnetv2_50"), IMAGES, keep="function")
    assert not conversion.kept
    assert not norms(conversion.model)
    affine = [change for change in conversion.changes if change.note.startswith("by an affine map per channel")]
    assert len(affine) == sum(isinstance(m, ChannelAffine) for m in conversion.model.modules()) == 17


def test_normalizers_without_statistics_stay_where_the_function_is_kept():
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4),
    )  # fmt: skip
    plain(IMAGES)
    conversion = convert(plain, IMAGES, keep="function", norms=("batch", "group"))
    reasons = {change.path: change.note for change in conversion.kept}
    assert reasons == dict.fromkeys("57", "it has no running statistics")
    assert_allclose(conversion.model.eval()(IMAGES), plain.eval()(IMAGES), atol=1e-5)


def test_other_normalizers_go_when_asked():
    model = timm.create_model("resnet26", num_classes=10, norm_layer="groupnorm")
    with pytest.raises(ValueError, match="it has no such normalizer"):
        convert(model, IMAGES)
    free = convert(model, IMAGES, norms=("batch", "group")).model
    assert not any(isinstance(m, nn.GroupNorm) for m in free.modules())


def test_of_a_converted_network_weights_alone_decay():
    model = convert(build("torchvision:resnet18"), IMAGES).model
    decayed, plain = param_groups(model, 1e-4)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (1e-4, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, exempt = (sorted(names[id(p)] for p in group["params"]) for group in (decayed, plain))
    assert decaying == sorted(name for name in names.values() if name.endswith(".weight"))
    assert sorted(decaying + exempt) == sorted(names.values())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "resnet18"}, TypeError, "model is 'resnet18'; it must be torch's Module"),
        ({"model": nn.Linear(3, 3)}, ValueError, "nothing in Linear can be converted"),
        ({"model": nn.BatchNorm2d(3)}, ValueError, "is a normalizer itself"),
        ({"alpha": 0}, ValueError, "alpha is 0"),
        ({"keep": "all"}, ValueError, "keep is 'all'"),
        ({"keep": "function", "alpha": 0.2}, ValueError, "where the function is kept, branches are not scaled"),
        ({"norms": "batch"}, ValueError, "norms is 'batch'"),
        ({"norms": ("bacth",)}, ValueError, "it must be a sequence of batch"),
        ({"depthwise": "no"}, ValueError, "depthwise is 'no'"),
        ({"exclude": "layer4"}, ValueError, r"exclude is 'layer4'; it must be a sequence"),
        ({"exclude": ["layer9"]}, ValueError, "exclude has 'layer9'"),
        ({"images": torch.full((4, 3, 32, 32), torch.nan)}, ValueError, "NaN"),
        ({"images": torch.zeros(4, 3, 32, 32)}, normfree.SignalError, "the output of conv1 is constant"),
        ({"images": torch.randn(4, 5, 32, 32)}, normfree.SignalError, "conv1"),
        ({"images": "photos"}, TypeError, "inputs hold no tensor"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_named(arguments, error, words):
    arguments = dict(arguments)  # of which another run takes its own
    model = arguments.pop("model") if "model" in arguments else build("torchvision:resnet18")
    images = arguments.pop("images", torch.randn(4, 3) if isinstance(model, nn.Linear) else IMAGES)
    with pytest.raises(error, match=words):
        convert(model, images, **arguments)
