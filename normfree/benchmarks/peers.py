"""The networks that are compared: ours, what people use, and the limit."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.conversion import convert
from normfree.models import ResidualNetwork, create_model, from_timm
from normfree.nn import MaxPool2d
from normfree.nn.conv import SameConv2d


class PlainBlock(nn.Module):
    """A pre-activation bottleneck of convolutions, ReLU and one addition: no normalizer, gain or scalar."""

    def __init__(self, in_channels: int, channels: int, stride: int, padding: str) -> None:
        super().__init__()
        width = channels // 4
        self.conv0 = nn.Conv2d(in_channels, width, 1)
        self.conv1 = SameConv2d(width, width, 3, stride, "same" if padding == "same" else 1)
        self.conv2 = nn.Conv2d(width, channels, 1)
        projects = stride > 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride) if projects else None
        # What remains of the signal without any of the above; it keeps the numbers finite and costs nothing.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(x)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(F.relu(self.conv1(F.relu(self.conv0(out)))))


class PlainResNet(nn.Module):
    """The limit: the topology of a pre-activation ResNet in what cannot be left out of it, padded as it is."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), padding: str = "same") -> None:
        super().__init__()
        self.stem = nn.Sequential(SameConv2d(3, 64, 7, 2, "same" if padding == "same" else 3), MaxPool2d(padding))
        blocks, channels = [], 64
        for stage, depth in enumerate(depths):
            for position in range(depth):
                width = 256 * 2**stage
                blocks.append(PlainBlock(channels, width, 2 if stage and position == 0 else 1, padding))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.blocks(self.stem(x))).mean((2, 3)))


def ours(name: str, **arguments: Any) -> ResidualNetwork:
    """One of our networks as it trains, but without stochastic depth, which the others lack, and with open branches."""
    model = create_model(name, stochastic_depth_rate=0.0, drop_rate=0.0, **arguments)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("skip_gain"):
                parameter.fill_(0.5)
    return model


def timm_in_the_paper_s_form() -> nn.Module:
    """timm's nf_resnet50 with SkipInit gains and γ in the activation.

    As released its backward raises, since an activation is multiplied in place: that multiplication is replaced by an
    ordinary one.
    """
    import timm
    from timm.models.nfnet import GammaAct

    class OutOfPlace(GammaAct):
        def forward(self, x: Tensor) -> Tensor:
            return self.act_fn(x, inplace=self.inplace) * self.gamma

    model = timm.create_model("nf_resnet50", skipinit=True, gamma_in_act=True)
    for module in model.modules():
        if isinstance(module, GammaAct):
            module.__class__ = OutOfPlace
    return model


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def _torchvision(name: str) -> nn.Module:
    models: Any = importlib.import_module("torchvision.models")
    return models.get_model(name)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "nf_resnet50": functools.partial(ours, "nf_resnet50"),
    "nf_resnet50, symmetric padding": functools.partial(ours, "nf_resnet50", padding="symmetric"),
    "limit: plain convolutions": PlainResNet,
    "limit, symmetric padding": functools.partial(PlainResNet, padding="symmetric"),
    **{f"nf_resnet{depth}": functools.partial(ours, f"nf_resnet{depth}") for depth in (101, 200)},
    "torchvision resnet50": functools.partial(_torchvision, "resnet50"),
    "torchvision resnet50, converted": lambda: convert(_torchvision("resnet50"), torch.randn(16, 3, 64, 64)).model,
    "timm resnetv2_50 (BatchNorm)": functools.partial(_timm, "resnetv2_50.a1h_in1k"),
    "timm nf_resnet50": functools.partial(_timm, "nf_resnet50"),
    "timm nf_resnet50, paper's form": timm_in_the_paper_s_form,
    "from_timm(nf_resnet50)": lambda: from_timm(_timm("nf_resnet50")),
    **{f"nf_regnet_b{level}": functools.partial(ours, f"nf_regnet_b{level}") for level in range(3)},
    **{f"timm nf_regnet_b{level}": functools.partial(_timm, f"nf_regnet_b{level}") for level in range(3)},
    **{f"timm efficientnet_b{level}": functools.partial(_timm, f"efficientnet_b{level}") for level in range(3)},
    "timm regnety_008": functools.partial(_timm, "regnety_008"),
}
"""The networks by name, each with new parameters."""
