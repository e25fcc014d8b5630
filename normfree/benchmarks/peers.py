"""Networks to compare with that no library has: plain convolutions, and what peers are without their mistakes.

On the command line they are `normfree.benchmarks.peers:plain_resnet50` and so on, as any function that makes a model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.models import create_model, from_timm
from normfree.nn import MaxPool2d
from normfree.nn.padding import SameConv2d


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
        """Apply the block, (N, C, H, W) to (N, C', H / stride, W / stride)."""
        out = F.relu(x)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(F.relu(self.conv1(F.relu(self.conv0(out)))))


class PlainResNet(nn.Module):
    """Topology of a pre-activation ResNet in what cannot be left out, padded as it is, by torch's convolutions."""

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
        """Compute logits, (N, 3, H, W) to (N, 1000)."""
        return self.fc(F.relu(self.blocks(self.stem(x))).mean((2, 3)))


def plain_resnet50() -> nn.Module:
    """Make the plain convolutions of `nf_resnet50`, padded as the authors pad."""
    return PlainResNet()


def plain_resnet50_symmetric() -> nn.Module:
    """Make the plain convolutions of `nf_resnet50` with padding="symmetric"."""
    return PlainResNet(padding="symmetric")


def nf_resnet50_symmetric() -> nn.Module:
    """Make our `nf_resnet50` with padding="symmetric"."""
    return create_model("nf_resnet50", padding="symmetric")


def small_nf_resnet26() -> nn.Module:
    """Make our `nf_resnet26` of half the width."""
    return create_model("nf_resnet26", width=0.5)


def small_bn_resnet26() -> nn.Module:
    """Make the BatchNorm network that `small_nf_resnet26` is without."""
    return create_model("bn_resnet26", width=0.5)


def frozen_resnet50() -> nn.Module:
    """Make torchvision's resnet50 with frozen BatchNorm, as its detectors have it: a multiplication and an addition."""
    import torchvision

    return torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)


class DetectionLoss(nn.Module):
    """The sum of the losses of torchvision's `fasterrcnn_resnet50_fpn`, one object in each image of 320 pixels.

    As it comes without weights: with BatchNorm, nothing frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection import fasterrcnn_resnet50_fpn

        self.detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=320, max_size=320)

    def forward(self, x: Tensor) -> Any:
        """Compute the loss of images, (N, 3, 320, 320), a scalar; in eval mode, what the detector does."""
        if not self.training:
            return self.detector(list(x))
        height, width = x.shape[2:]
        box = x.new_tensor([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]])
        targets = [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64)} for _ in x]
        return sum(self.detector(list(x), targets).values())


def nf_resnet50_from_timm() -> nn.Module:
    """Make timm's nf_resnet50 on our layers."""
    import timm

    return from_timm(timm.create_model("nf_resnet50"))


def timm_nf_resnet50_of_the_paper() -> nn.Module:
    """Make timm's nf_resnet50 with SkipInit gains and γ in the activation.

    As released its backward raises, since an activation is multiplied in place: that multiplication is replaced by an
    ordinary one.
    """
    import timm
    from timm.models.nfnet import GammaAct

    class OutOfPlace(GammaAct):
        def forward(self, x: Tensor) -> Tensor:
            return self.act_fn(x, inplace=self.inplace) * self.gamma

    model: nn.Module = timm.create_model("nf_resnet50", skipinit=True, gamma_in_act=True)
    for module in model.modules():
        if isinstance(module, GammaAct):
            module.__class__ = OutOfPlace
    return model


def open_and_steady(model: Any) -> nn.Module:
    """Open the branches of a network of ours, and switch off what drops activations in anybody's, for fair timing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("drop_rate", "drop_prob"):  # ours and timm's stochastic depth
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
        if type(module).__name__ == "StochasticDepth":  # torchvision's
            module.p = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("skip_gain"):
                parameter.fill_(0.5)
    return model
