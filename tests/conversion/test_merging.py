"""Merging: methods of other packages that merge normalizers and branches give the same function after a conversion."""

import copy
import pickle

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import normfree
from tests.helpers import assert_allclose


class Fused(nn.Module):
    """A convolution and its BatchNorm, merged in place as ultralytics does."""

    def __init__(self, channels_in, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        """Normalize what is convolved."""
        x = self.conv(x)
        return torch.relu(self.bn(x) if hasattr(self, "bn") else x)


class Detector(nn.Module):
    """A network whose `fuse` merges all of its parts, as ultralytics' does."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(Fused(3, 8), Fused(8, 8), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        """Run all parts."""
        return self.model(x)

    def fuse(self):
        """Merge."""
        for m in self.modules():
            if isinstance(m, Fused):
                bn = m.bn
                m.conv.weight, m.conv.bias = fuse_conv_bn_weights(
                    m.conv.weight, m.conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
                )
                del m.bn
        return self


class Branches(nn.Module):
    """Three parallel branches that become one convolution; biases before a normalizer are passed over."""

    def __init__(self):
        super().__init__()
        self.one, self.three = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.merged = None

    def forward(self, x):
        """Add the branches."""
        if self.merged is not None:
            return self.merged(x)
        a, b, c = self.norms
        return a(self.one(x)) + b(self.three(x)) + c(x)

    def switch_to_deploy(self):
        """Merge."""
        identity = torch.eye(8)[:, :, None, None]
        kernels = [nn.functional.pad(self.one.weight, [1] * 4), self.three.weight, nn.functional.pad(identity, [1] * 4)]
        kernel, bias = 0, 0
        for norm, weight in zip(self.norms, kernels, strict=True):
            assert isinstance(norm, nn.BatchNorm2d)
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            kernel, bias = kernel + weight * factor.view(-1, 1, 1, 1), bias + norm.bias - norm.running_mean * factor
        self.merged = nn.Conv2d(8, 8, 3, padding=1)
        self.merged.weight, self.merged.bias = nn.Parameter(kernel), nn.Parameter(bias)
        del self.one, self.three, self.norms


def _trained(model):
    """Give normalizers statistics, scales and shifts."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5), (module.bias.data, -0.3, 0.3),
            ):  # fmt: skip
                tensor.uniform_(low, high)
    return model.eval()


@pytest.mark.parametrize("keep", ["weights", "function"])
@pytest.mark.parametrize("state", ["converted", "folded", "copied", "pickled", "loaded"])
def test_fuse_keeps_what_a_converted_network_computes(keep, state, tmp_path):
    original, images = _trained(Detector()), torch.randn(4, 3, 12, 12)
    conversion = normfree.convert(original, images, keep=keep)
    model = conversion.model.eval()
    expected = model(images).detach()
    if state == "loaded":
        model = normfree.load_converted(Detector(), conversion.save(tmp_path / "c.safetensors")).eval()
    model = {
        "folded": normfree.fold, "copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m)),
    }.get(state, lambda m: m)(model)  # fmt: skip
    assert_allclose(model.fuse()(images), expected, atol=1e-5)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert not any(hasattr(m, "bn") for m in model.modules())
    assert_allclose(conversion.model(images), expected, atol=1e-5, what="the converted network")


def test_branches_are_merged_exactly():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _trained(Branches()), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    images = torch.randn(4, 3, 12, 12)
    free = normfree.convert(model, images).model.eval()
    free[1].one.bias.data.normal_()
    expected = free(images).detach()
    free[1].switch_to_deploy()
    assert_allclose(free(images), expected, atol=1e-5)
    assert type(free[3]).__name__ == "ScaledWSConv2d"
    assert free.train()(images).requires_grad


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s1", "repvit_m0_9", "levit_128s", "fastvit_t8"])
def test_timm_merges_the_layers_of_converted_networks(name):
    model = _trained(timm.create_model(name, num_classes=3))
    x = torch.randn(4, 3, *[224 if "levit" in name else 64] * 2)
    free = normfree.convert(model, x).model.eval()
    with torch.no_grad():
        merged, expected = reparameterize_model(free), free(x)
        assert_allclose(merged(x), expected, atol=1e-4 * float(expected.abs().max()))
    assert len(list(merged.modules())) < len(list(free.modules()))


def test_a_merge_that_fails_leaves_the_network_as_it_computes():
    class Fails(Detector):
        def fuse(self):
            """Begin, and fail."""
            assert isinstance(self.model[0].bn, nn.BatchNorm2d)
            raise RuntimeError("no")

    images = torch.randn(4, 3, 12, 12)
    free = normfree.convert(_trained(Fails()), images).model.eval()
    expected = free(images).detach()
    with pytest.raises(RuntimeError, match="no"):
        free.fuse()
    assert_allclose(free(images), expected, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in free.modules())


def test_merging_by_somebody_s_function_is_told_to_fold():
    free = normfree.convert(_trained(Detector()), torch.randn(4, 3, 12, 12)).model
    with pytest.raises(AttributeError, match=r"this normalizer was removed and has no running_var: `normfree\.fold`"):
        _ = free.model[0].bn.running_var
    assert not hasattr(free.model[0].bn, "eps")


class FusesFeatures(nn.Module):
    """A method of the same name that its forward calls: the features of two branches are added."""

    def __init__(self):
        super().__init__()
        self.one, self.other = (nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)) for _ in range(2))

    def fuse(self, features):
        """Add."""
        return torch.stack(features).sum(0)

    def forward(self, x):
        """Run both branches."""
        return self.fuse([self.one(x), self.other(x)])


def test_a_method_that_fuses_features_is_left_alone():
    images = torch.randn(4, 3, 12, 12)
    free = normfree.convert(FusesFeatures(), images).model.train()
    free(images).square().sum().backward()
    assert free.training
    assert {type(part[0]).__name__ for part in (free.one, free.other)} == {"ScaledWSConv2d"}
    assert all(p.grad is not None for p in free.parameters())
