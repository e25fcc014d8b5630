"""NF-ResNets: pre-activation ResNets without activation normalization (Brock et al. 2021, section 4)."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from normfree.models.nf_blocks import NFBlocks
from normfree.models.trunk import RESNET_DEPTHS, Head, ResidualNetwork, build_stages, check_config, plan_resnet
from normfree.nn import MaxPool2d
from normfree.nn.gain import GainSource


@dataclass(frozen=True)
class NFResNetConfig:
    """The arguments of the authors' `NF_ResNet`."""

    depths: tuple[int, ...]  # blocks per stage
    width: float = 4  # the stem has 16 · width channels, the stages 64, 128, 256, 512 · width
    activation: str = "relu"  # a name of `normfree.nn.gain.ACTIVATIONS`
    se_ratio: float = 0.0  # hidden width of squeeze-excite over its channels; 0: none (the authors use 0.25)
    alpha: float = 0.2  # what a branch of unit variance is multiplied by
    skip_gain: float = 0.0  # initial SkipInit gain: every block starts as its shortcut
    drop_rate: float = 0.0  # dropout before the classifier
    stochastic_depth_rate: float = 0.1  # of the last block, growing linearly from 0
    num_classes: int = 1000  # 0: pooled features
    in_channels: int = 3
    padding: Literal["same", "symmetric"] = "same"  # "same" is the authors' (TensorFlow's); "symmetric" is PyTorch's
    gains: GainSource = "exact"  # γ by quadrature, or the authors' Monte-Carlo constants
    train_size: int = 224  # pixels
    test_size: int = 256
    weight_decay: float = 5e-5  # without gains, biases and skip gains
    standardize: bool = True  # False is the ablation: He initialisation and γ = 1, α and β kept


VARIANTS = {f"nf_resnet{depth}": NFResNetConfig(depths) for depth, depths in RESNET_DEPTHS.items()} | {
    f"nf_resnet{depth}_unstandardized": NFResNetConfig(depths, standardize=False)
    for depth, depths in RESNET_DEPTHS.items()
}


class NFResNet(ResidualNetwork):
    """A normalizer-free ResNet; see `NFResNetConfig` for what can be chosen.

    The same function as the authors' `NF_ResNet`, with every scalar carried by a convolution's weight: the activation's
    γ and the block's β in `in_scale`, the branch's α and SkipInit gain in the last convolution (or the gate).
    """

    def __init__(self, config: NFResNetConfig) -> None:
        check_config(config)
        nf = NFBlocks(config)
        plans = plan_resnet(config.depths, config.width, config.stochastic_depth_rate)
        super().__init__(
            config,
            nn.Sequential(nf.conv(config.in_channels, plans[0].in_channels, 7, stride=2), MaxPool2d(config.padding)),
            build_stages(plans, lambda plan: nf.block(plan, plan.out_channels // 4)),
            nf.activation(),
            Head(
                plans[-1].out_channels,
                config.num_classes,
                drop_rate=config.drop_rate,
                in_scale=nf.gamma,
                init_std=0.01,
            ),
        )
