"""`keep="function"`: the converted network computes what the original does, or a normalizer stays, or it is refused."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import normfree
from normfree.conversion import comparison, convert, load_converted
from normfree.errors import SignalError
from normfree.nn import ChannelAffine
from tests.helpers import assert_allclose

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(model, x):
    """Normalizers with statistics, scales and shifts of their own."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    for _ in range(20):
        model(x)
    return model


class Between(nn.Module):
    """A convolution, something between it and its normalizer, and a second pair that can always be converted."""

    def __init__(self, between=lambda h: h, leave=lambda self, h: ()):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.last = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.between, self.leave = between, leave

    def forward(self, x):
        h = self.conv(x)
        return self.last(self.norm(self.between(h)).relu()), *self.leave(self, h)


def keep_attribute(self, h):
    self.seen = h.flatten(2)
    return ()


IN_ANOTHER_ORDER = {
    "shuffled": lambda h: h.view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(h.shape),
    "rolled": lambda h: h.roll(1, 1),
    "rolled by all axes": lambda h: h.roll(64),
    "flipped": lambda h: h.flip(1),
    "indexed": lambda h: h[:, torch.arange(7, -1, -1)],
    "turned": lambda h: h.transpose(1, 2),
    "turned by permutation": lambda h: h.permute(0, 3, 1, 2),
    "regrouped": lambda h: h.reshape(-1, 4, 2, 8, 8).permute(0, 2, 1, 3, 4).flatten(1, 2),
    "shuffled by torch": lambda h: F.channel_shuffle(h, 4),
    "cut and put together": lambda h: torch.cat(h.chunk(2, 1)[::-1], 1),
    "positions become channels": lambda h: h.flatten(2).transpose(1, 2)[:, :8].unflatten(2, (2, 4)),
}
AS_IT_IS = {
    "plain": lambda h: h,
    "there and back": lambda h: h.flatten(2).unflatten(2, (8, 8)),
    "channels last and back": lambda h: h.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "rolled in space": lambda h: h.roll((1, 2), (2, 3)),
    "copied": lambda h: h.clone(),
    "turned in space": lambda h: h.transpose(2, 3),
}
LEAVING = {
    "returned": lambda self, h: (h,),
    "returned in another shape": lambda self, h: (h.flatten(1),),
    "returned detached": lambda self, h: (h.detach(),),
    "kept as an attribute": keep_attribute,
    "used": lambda self, h: (h.mean(),),
}


def differences(one, other, x=IMAGES):
    with torch.no_grad():
        return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(one.eval()(x), other.eval()(x), strict=True)]


def replaced_by_an_affine_map(conversion):
    """List path and reason of the normalizers that became an affine map per channel."""
    words = "by an affine map per channel, of no batch: "
    return [(c.path, c.note.removeprefix(words)) for c in conversion.changes if c.note.startswith(words)]


@pytest.mark.parametrize("between", IN_ANOTHER_ORDER.values(), ids=IN_ANOTHER_ORDER)
def test_channels_in_another_order_become_an_affine_map(between):
    model = trained(Between(between), IMAGES)
    conversion = convert(model, IMAGES, keep="function")
    assert not conversion.kept
    assert replaced_by_an_affine_map(conversion) == [
        ("norm", "it takes no layer's output as it is, channels in their order")
    ]
    assert type(conversion.model.norm) is ChannelAffine
    assert max(differences(model, conversion.model)) < 1e-4
    assert conversion.difference < 1e-4
    lost = [c.note for c in convert(model, IMAGES).changes if c.path == "norm"]
    assert lost == ["its scale and shift are lost: no single layer can carry them"]


@pytest.mark.parametrize("between", AS_IT_IS.values(), ids=AS_IT_IS)
def test_channels_in_their_order_do_not(between):
    model = trained(Between(between), IMAGES)
    conversion = convert(model, IMAGES, keep="function")
    assert not conversion.kept
    assert max(differences(model, conversion.model)) < 1e-4


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING)
def test_an_output_that_others_take_too_stays_as_it_is(leave):
    model = trained(Between(leave=leave), IMAGES)
    conversion = convert(model, IMAGES, keep="function")
    assert not conversion.kept
    assert replaced_by_an_affine_map(conversion) == [
        ("norm", "the output of conv, which it takes, is used elsewhere too, or leaves the network")
    ]
    assert max(differences(model, conversion.model)) < 1e-4


class Frozen(nn.Module):
    """As people write them: eps is anywhere."""

    def __init__(self, channels, hidden_eps=1e-5):
        super().__init__()
        self.hidden = hidden_eps
        for name, value in {
            "weight": torch.rand(channels) + 0.5, "bias": torch.randn(channels),
            "running_mean": torch.randn(channels), "running_var": torch.rand(channels) * 0.1,
        }.items():  # fmt: skip
            self.register_buffer(name, value)

    def forward(self, x):
        weight, bias, mean, variance = (
            t.view(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + self.hidden).rsqrt()
        return x * scale + (bias - mean * scale)


class SomeFrozenBatchNorm2d(Frozen):
    """Without an eps."""


class FrozenBatchNorm2dWithAnEps(Frozen):
    """With one that its forward does not use."""

    eps = 0.1


class FrozenBatchNormReLU(Frozen):
    """Rectifies too."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("frozen", [SomeFrozenBatchNorm2d, FrozenBatchNorm2dWithAnEps])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_frozen_normalizers_do_what_their_forward_does(frozen, eps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), frozen(8, eps), nn.ReLU())
    conversion = convert(model, IMAGES, keep="function")
    assert not conversion.kept
    torch.testing.assert_close(conversion.model(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


class GroupAndReLU(nn.GroupNorm):
    def forward(self, x):
        return F.relu(super().forward(x))


class InstanceAndLeaky(nn.InstanceNorm2d):
    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.01)


class LayerAndGELU(nn.LayerNorm):
    def forward(self, x):
        return F.gelu(super().forward(x))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


class TwiceLayerNorm2d(LayerNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class LikeGroup(nn.GroupNorm):
    """Another way to write it."""

    def forward(self, x):
        groups = x.unflatten(1, (self.num_groups, -1)).flatten(2)
        scaled = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + self.eps).sqrt()
        return scaled.view_as(x) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class LastAxis(nn.Module):
    """A LayerNorm over the channels of an image."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS = {
    "group and ReLU": (lambda: GroupAndReLU(2, 8), "group", False),
    "instance and leaky": (lambda: InstanceAndLeaky(8), "instance", False),
    "layer and GELU": (lambda: LastAxis(LayerAndGELU(8)), "layer", False),
    "twice": (lambda: TwiceLayerNorm2d(8), "layer", False),
    "frozen and ReLU": (lambda: FrozenBatchNormReLU(8), "batch", False),
    "layer on images": (lambda: LayerNorm2d(8), "layer", True),
    "another group": (lambda: LikeGroup(2, 8), "group", True),
    "group": (lambda: nn.GroupNorm(2, 8), "group", True),
    "instance": (lambda: nn.InstanceNorm2d(8, affine=True), "instance", True),
    "torchvision's layer": (lambda: torchvision.models.convnext.LayerNorm2d(8), "layer", True),
    "layer": (lambda: LastAxis(nn.LayerNorm(8)), "layer", True),
}


@pytest.mark.parametrize(("make", "kind", "goes"), NORMS.values(), ids=NORMS)
def test_every_normalizer_is_tried_on_numbers(make, kind, goes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    kept = convert(model, IMAGES, norms=sorted({kind, "batch"})).kept
    assert [change.note.rpartition(" computes")[2] for change in kept] == ([] if goes else [" something of its own"])


def spoiled(monkeypatch, by=1.1):
    """Let the conversion make a mistake."""
    compute = comparison.observe

    def changed(model, *args, **options):
        with torch.no_grad():
            original = model.conv.gain.clone()
            model.conv.gain.mul_(by)
            found = compute(model, *args, **options)
            model.conv.gain.copy_(original)
        return found

    monkeypatch.setattr(comparison, "observe", changed)


def test_a_difference_is_refused_and_the_first_place_named(monkeypatch):
    model = trained(Between(), IMAGES)
    spoiled(monkeypatch)
    with pytest.raises(
        SignalError, match=r"would change the function: the output of norm differs by .* Exclude the norm"
    ):
        convert(model, IMAGES, keep="function")


class Boxes(Between):
    """Keeps what is larger than a threshold, the number of which depends on values."""

    def forward(self, x):
        scores = super().forward(x)[0].mean((2, 3))
        boxes = torch.cat([scores[:, :2], scores[:, :2] + 1], 1)
        kept = torchvision.ops.nms(boxes, scores[:, 0], 0.3)
        return boxes[kept], scores[scores > 0.1]


def test_outputs_whose_number_depends_on_values_are_compared_before_that(monkeypatch):
    model = trained(Boxes(), IMAGES)
    assert convert(model, IMAGES, keep="function").difference < 1e-4
    spoiled(monkeypatch)
    with pytest.raises(SignalError, match="the output of norm differs"):
        convert(model, IMAGES, keep="function")


def test_an_output_that_is_rounding_hides_no_difference_of_another(monkeypatch):
    model = trained(Cancelling(), IMAGES)
    spoiled(monkeypatch)
    with pytest.raises(SignalError, match="the output of norm differs"):
        convert(model, IMAGES, keep="function")


class Drifting(Between):
    """Another output whenever it runs."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)[0] * (1 + 0.1 * (self.calls % 2) + 0.01 * self.calls)


def test_a_forward_that_differs_from_itself_is_said_to():
    model = trained(Drifting(), IMAGES)
    with pytest.warns(UserWarning, match="a Drifting differs from itself when it is run twice"):
        convert(model, IMAGES, keep="function")


class Noisy(Between):
    """Draws random numbers in eval mode too."""

    def forward(self, x):
        return super().forward(x)[0] + torch.randn(8)[:, None, None]


class Cancelling(Between):
    """An output that is nothing but rounding."""

    def forward(self, x):
        h = super().forward(x)[0]
        return h, (h.sum((1, 2, 3)) - h.flatten(1).sum(1, dtype=torch.float64).float()) * 1e-3


@pytest.mark.parametrize("network", [Noisy, Cancelling])
def test_randomness_and_rounding_are_no_difference(network):
    model = trained(network(), IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not convert(copy.deepcopy(model), IMAGES, keep="function").kept


def test_outputs_that_vanish_below_normal_numbers_are_equal_within_what_is_left_of_them():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)) for _ in range(3))).eval()
    with torch.no_grad():
        for block in model:
            block[0].weight.mul_(1e-14)
    assert 0 < float(model(IMAGES).detach().abs().max()) < 1e-38
    assert convert(model, IMAGES, keep="function").difference < 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_it_trains_as_a_frozen_normalizer_does(bias, tmp_path):
    """Scale and shift are those of what is centred, as in a normalizer: the same steps at the same rates."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2),
        ).double()  # fmt: skip

    x = 3 + 2 * IMAGES.double()  # channels with means that are no rounding
    frozen = trained(network(), x).eval()
    if bias:  # one before a shift would make the shift move twice as fast
        frozen[0].bias.requires_grad_(False)
        frozen[3].bias.requires_grad_(False)
    kept = convert(frozen, x, keep="function").model.train()
    for model in (frozen, kept):
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(16) % 2).backward()
            optimizer.step()
    for convolution, norm in ((0, 1), (3, 4)):
        assert_allclose(kept[convolution].weight, frozen[convolution].weight, atol=1e-9)
        assert_allclose(kept[convolution].gain, frozen[norm].weight, atol=1e-9)
    assert_allclose(kept(x), frozen(x), atol=1e-9)
    again = load_converted(network(), convert(frozen, x, keep="function").save(tmp_path / "c.safetensors")).eval()
    assert_allclose(again(x), frozen(x), atol=1e-9)
    assert_allclose(normfree.fold(kept)(x), frozen(x), atol=1e-9)


def test_a_frozen_normalizer_that_closes_a_channel_can_open_it_again():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.tensor([0.0, 2, 1])), nn.Parameter(torch.tensor([1.0, 0, -1]))
            self.register_buffer("running_mean", torch.tensor([0.5, -1, 2]))
            self.register_buffer("running_var", torch.tensor([0.25, 4, 1]))

        def forward(self, x):
            scale = self.weight * (self.running_var + 1e-3).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale[:, None, None] + shift[:, None, None]

    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), FrozenBatchNorm2d()).eval()
    kept = convert(frozen, IMAGES, keep="function").model
    for model in (frozen, kept):
        model(IMAGES).square().sum().backward()
    assert_allclose(kept[0].gain.grad, frozen[1].weight.grad, rtol=1e-4)
    assert_allclose(kept[0].weight.grad, frozen[0].weight.grad, rtol=1e-4, atol=1e-3)


def test_a_normalizer_without_a_shift_gets_none_that_trains():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)).eval()
    kept = convert(model, IMAGES, keep="function").model
    assert [name for name, p in kept.named_parameters() if p.requires_grad] == ["0.weight"]
