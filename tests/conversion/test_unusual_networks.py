"""Networks as people write them: own classes, hooks, lists, writes in place, frozen parts."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import normfree
from normfree.conversion import convert
from normfree.nn.scaled_layer import ScaledWS
from tests.helpers import assert_allclose, assert_equal

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class RectifiedNorm(nn.BatchNorm2d):
    """More than a BatchNorm."""

    def forward(self, x):
        return F.relu(super().forward(x))


class QuickNorm(nn.BatchNorm2d):
    """A BatchNorm written down once more, with an activation that it owns."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        own = self.training or self.running_mean is None
        return self.act(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, own, 0.1, self.eps)
        )


class ConditionalNorm(nn.BatchNorm2d):
    """Another signature."""

    def forward(self, x, shift):
        return super().forward(x) + shift


class Conditional(nn.Module):
    """Its first normalizer is told what to add."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), ConditionalNorm(8)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x):
        return self.head(self.norm(self.conv(x), 1.0))


@pytest.mark.parametrize("keep", ["weights", "function"])
def test_a_normalizer_that_does_more_stays(keep):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), RectifiedNorm(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    conversion = convert(model, IMAGES, keep=keep)
    assert [(c.path, c.note) for c in conversion.kept] == [("1", "a RectifiedNorm computes something of its own")]
    assert [c.path for c in convert(Conditional().eval(), IMAGES, keep=keep).kept] == ["norm"]
    instance = nn.BatchNorm2d(8)
    instance.forward = lambda x: x
    model = nn.Sequential(nn.Conv2d(3, 8, 3), instance, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    assert [c.path for c in convert(model, IMAGES, keep=keep).kept] == ["1"]


def test_a_normalizer_that_is_written_anew_goes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), QuickNorm(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    conversion = convert(model, IMAGES)
    assert not conversion.kept
    assert isinstance(conversion.model[1], nn.SiLU)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(1, 8, 1), (16, 1, 6, 6)), (nn.Conv2d(8, 8, 1, groups=8), (16, 8, 6, 6)), (nn.Linear(1, 8), (64, 1))],
)
def test_filters_of_one_weight_keep_it(layer, shape):
    norm = nn.BatchNorm1d(8) if isinstance(layer, nn.Linear) else nn.BatchNorm2d(8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = convert(nn.Sequential(layer, norm, nn.ReLU()), x).model
    axes = [0] if x.ndim == 2 else [0, 2, 3]
    assert model[0](x).var(axes, correction=0).mean().item() == pytest.approx(1, rel=1e-3)
    assert_allclose(model(x), model.double()(x.double()).float(), atol=1e-4)


def test_a_normalizer_of_constant_filters_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    nn.init.constant_(model[0].weight, 0.1)
    (kept,) = convert(model, IMAGES).kept
    assert (kept.path, kept.note) == (
        "1", "normalizes the output of 0: its weight is constant: without its mean it is zero"
    )  # fmt: skip


def test_hooks_attributes_and_foreign_buffers_stay():
    model = timm.create_model(
        "mobilenetv2_035", features_only=True, feature_location="expansion", out_indices=(0, 1, 2)
    )
    images = torch.randn(4, 3, 64, 64)
    converted = convert(model, images).model
    assert [f.shape for f in converted(images)] == [f.shape for f in model(images)]
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    for name, module in model.named_children():
        module.tag = name
        handle = module.register_forward_hook(lambda m, *_: seen.append(m.tag))
    converted = convert(model, IMAGES, inplace=True).model.eval()
    seen.clear()
    converted(IMAGES)
    assert seen == ["0", "1"]
    handle.remove()
    normfree.fold(converted)(IMAGES)
    assert seen == ["0", "1", "0"]
    masked = nn.Conv2d(8, 8, 3)
    masked.register_buffer("mask", torch.ones(8, 8, 3, 3))
    conversion = convert(
        nn.Sequential(*model, masked, nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), IMAGES
    )
    assert "it holds mask besides weight and bias" in next(c.note for c in conversion.kept if c.path == "3")


class Listed(nn.Module):
    """Its forward goes past its modules."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.steps = [self.conv, self.norm, nn.ReLU()]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


def test_modules_in_a_plain_list_are_refused():
    for keep in ("weights", "function"):
        with pytest.raises(normfree.SignalError, match=r"was replaced and did not run: .*nn\.ModuleList"):
            convert(Listed(), IMAGES, keep=keep)


class Written(nn.Module):
    """Writes into its residual stream's other view."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm1(x)
        self.write(y)
        return x + self.norm2(self.conv(F.relu(y)))


def mask(y):
    y[..., 8:] = 0


@pytest.mark.parametrize("write", [mask, lambda y: F.relu_(y.flatten(2)), lambda y: y[:, :4].sigmoid_()])
def test_what_is_written_into_a_view_is_not_the_stream(write):
    model = convert(Written(write), IMAGES).model.train()
    streams = []
    model.stem.register_forward_hook(lambda _, __, out: streams.append((out, out.clone())))
    model(IMAGES).square().sum().backward()
    assert_equal(*streams[0], "the stream")


def test_a_tied_weight_is_not_scaled():
    tied = nn.Conv2d(3, 3, 3)
    model = nn.Sequential(tied, nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3))
    model[3].weight = tied.weight
    assert_equal(convert(model, IMAGES).model[3].weight, tied.weight)


class Raw(nn.Module):
    """A normalizer of its input and of a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(11), nn.Conv2d(11, 4, 1)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(self.out(F.relu(self.norm(torch.cat([self.conv(x), x], 1)))))


def test_a_normalizer_of_the_input_too_stays():
    (kept,) = convert(Raw(), IMAGES * 60 + 128).kept
    assert (kept.path, kept.note) == ("norm", "it normalizes the network's input too, past all weight layers")


def test_frozen_networks_stay_frozen():
    for model, keep in itertools.product(
        (
            timm.create_model("resnet10t"),
            nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)),
        ),
        ("weights", "function"),
    ):
        converted = convert(model.requires_grad_(False), torch.randn(8, 3, 64, 64), keep=keep).model
        assert any(isinstance(m, ScaledWS) for m in converted.modules())
        assert not [name for name, p in converted.named_parameters() if p.requires_grad]


class Bounded(nn.Module):
    """A branch that no scale can give a variance of 1."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        x = F.relu(self.norm1(self.stem(x)))
        return x + self.norm2(self.conv(x)).softmax(1)


def test_a_branch_that_stays_off_its_variance_is_reported():
    conversion = convert(Bounded(), IMAGES)
    assert conversion.departure > 0.02
    assert f"variances are up to {conversion.departure:.0%} off what they should be" in str(conversion)


def test_loaders_of_detection_and_of_several_sizes_give_images():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

        def forward(self, images, targets=None):
            return self.body(torch.stack(list(images)))

    pairs = [(image, {"boxes": torch.rand(2, 4)}) for image in IMAGES]
    loader = DataLoader(pairs, batch_size=4, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    assert not convert(Detector(), loader).kept
    sizes = DataLoader([torch.randn(4, 3, size, size) for size in (16, 16, 24)], batch_size=None)
    assert convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), sizes).before.inputs == "8×3×16×16"


def test_the_original_is_not_changed_by_what_its_forward_counts():
    class Counting(nn.Sequential):
        def forward(self, x):
            self.steps += 1
            return super().forward(x)

    model = Counting(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.register_buffer("steps", torch.zeros(()))
    convert(model, IMAGES)
    assert not model.steps
