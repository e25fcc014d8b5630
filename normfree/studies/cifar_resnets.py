"""BatchNorm networks as people build them for small images: what the study of conversion converts."""

import math
from typing import Any

import timm
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from normfree.studies.successors import SUCCESSORS


class CifarResNet(nn.Module):
    """Three stages of basic blocks on images of about 32 pixels (He et al. 2015, section 4.2), in torchvision's blocks.

    `depth` is 6n + 2; shortcuts are projections where the shape changes. `norm` names what stands in BatchNorm's place,
    one of `NORMS`. Raises ValueError for another depth or norm.
    """

    def __init__(
        self, depth: int = 20, width: int = 16, norm: str = "batch", num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}; it must be 6n + 2: 20, 32, 44, 56, 110, …")
        self.norm = _layer(norm)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = self.norm(width)
        stages = [self._stage(width * max(2**i // 2, 1), width * 2**i, (depth - 2) // 6) for i in range(3)]
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, inputs: int, channels: int, blocks: int) -> nn.Module:
        shortcut, stride = None, 1
        if inputs != channels:
            stride = 2
            shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), self.norm(channels))
        first = BasicBlock(inputs, channels, stride, shortcut, norm_layer=self.norm)
        rest = [BasicBlock(channels, channels, norm_layer=self.norm) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        x = self.layers(self.bn1(self.conv1(x)).relu())
        return self.fc(x.mean((2, 3)))


def timm_resnet18(width: int = 64, norm: str = "batch", num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Make timm's ResNet-18 with a stem for small images: 3×3, no stride, no pooling; `width` channels at first.

    `norm` names what stands in BatchNorm's place, one of `NORMS`. Raises ValueError for another.
    """
    model: Any = timm.create_model(
        "resnet18", num_classes=num_classes, stem_type="deep", stem_width=width // 2,
        channels=tuple(width * 2**i for i in range(4)), norm_layer=_layer(norm),
    )  # fmt: skip
    model.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _nothing(channels: int, **_: Any) -> nn.Module:
    return nn.Identity()


def _grouped(channels: int, **_: Any) -> nn.Module:
    return nn.GroupNorm(math.gcd(8, channels), channels)


NORMS: dict[str, Any] = {"batch": nn.BatchNorm2d, "group": _grouped, "none": _nothing, **SUCCESSORS}
"""What may stand in BatchNorm's place, by name."""


def _layer(norm: str) -> Any:
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it must be {', '.join(NORMS)}")
    return NORMS[norm]
