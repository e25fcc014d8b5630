"""A converted network goes on living in its package: its optimizer, its buffers, its exports."""

import pytest
import torch
import torchvision
from torch import nn

import normfree
from normfree.conversion import convert, load_converted
from tests.helpers import assert_allclose

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Policy(nn.Module):
    """Carries its optimizer, normalizers without decay."""

    def __init__(self, *, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(288, 4)
        norms = list(self.body[1].parameters())
        others = [p for p in self.parameters() if not any(p is q for q in norms)]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("keep", ["weights", "function"])
def test_an_optimizer_that_a_model_carries_has_the_new_parameters(keep, inplace, bias):
    torch.manual_seed(0)
    model = Policy(bias=bias)
    model(IMAGES).sum().backward()
    model.optimizer.step()
    model.optimizer.zero_grad()
    free = convert(model, IMAGES, keep=keep, inplace=inplace).model
    names = {id(p): name for name, p in free.named_parameters()}
    groups = [sorted(names[id(p)] for p in group["params"]) for group in free.optimizer.param_groups]
    assert groups == [["body.0.weight", "head.bias", "head.weight"], ["body.0.bias", "body.0.gain"]]
    before = {name: p.detach().clone() for name, p in free.named_parameters()}
    free(IMAGES).square().sum().backward()
    free.optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in free.named_parameters())
    if not inplace:
        assert len(model.optimizer.param_groups[1]["params"]) == 2


class Views(nn.Sequential):
    """A buffer that is a part of another tensor, two that share one, and tied weights."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 8), nn.Linear(8, 8, bias=False)
        )
        self[4].weight = nn.Parameter(torch.randn(8, 8))
        self.tied = self[4].weight
        window = torch.hann_window(33)
        self.register_buffer("window", window[:16])
        self.register_buffer("all", window)
        self.register_buffer("turned", window.view(3, 11).t())


def test_buffers_that_are_views_and_tied_weights_are_saved(tmp_path):
    torch.manual_seed(0)
    conversion = convert(Views(), IMAGES)
    path = conversion.save(tmp_path / "free.safetensors")
    fresh = Views()
    fresh.window.zero_()
    again = load_converted(fresh, path)
    for name, tensor in conversion.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.tied is again[4].weight


class Outputs(nn.Module):
    def __init__(self, put):
        super().__init__()
        self.body, self.put = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), put

    def forward(self, x):
        h = self.body(x)
        return self.put(h, h.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
@pytest.mark.parametrize(
    "put",
    [
        lambda h, mean: {"features": h, "mean": mean},
        lambda h, mean: (h, [mean, {"square": mean**2}]),
        lambda h, mean: [mean, h],
    ],
    ids=["dictionary", "nested", "list"],
)
def test_outputs_of_any_nesting_are_exported_and_compared(put, to, tmp_path):
    torch.manual_seed(0)
    free = convert(Outputs(put), IMAGES).model
    exported = normfree.export(free, tmp_path / f"net.{to}", to=to, size=32)
    assert exported.difference <= 1e-4 * max(1, exported.largest)


@pytest.mark.slow
def test_a_segmentation_network_is_exported(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    free = convert(model, torch.randn(4, 3, 64, 64)).model
    exported = normfree.export(free, tmp_path / "net.pt2", to="pt2", size=64)
    program = torch.export.load(exported.path).module()
    x = torch.randn(2, 3, 96, 80)
    assert_allclose(program(x)["out"], free.eval()(x)["out"], rtol=1e-3, atol=1e-3)
