"""The blocks of normalizer-free networks, whatever the family."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from normfree.models.block_plan import BlockPlan
from normfree.models.config import NetworkConfig
from normfree.nn import (
    AveragePool2d,
    PreActivationBlock,
    ScaledWSConv2d,
    SqueezeExcite,
    VarianceLedger,
    gain,
    make_activation,
)
from normfree.nn.gains import GainSource


@dataclass(frozen=True, kw_only=True)
class NFConfig(NetworkConfig):
    """Configuration that all normalizer-free networks have; each family adds its own."""

    se_ratio: float = 0.0  # hidden width of squeeze-excite over its channels; 0: none
    alpha: float = 0.2  # what a branch of unit variance is multiplied by
    skip_gain: float | None = 0.0  # initial SkipInit gain: every block starts as its shortcut; None: no such gains
    gains: GainSource = "exact"  # γ by quadrature, or the authors' Monte-Carlo constants
    standardize: bool = True  # False is the ablation: He initialisation and γ = 1, α and β kept
    gamma: bool = True  # False is the ablation: γ = 1
    beta: bool = True  # False is the ablation: blocks do not divide by the expected deviation
    output_stride: int = 32  # of the last stage; 16 and 8 dilate convolutions instead of striding
    filter_gains: bool = True  # False is the ablation: the gain of every filter stays 1


class NFBlocks:
    """Makes the convolutions and blocks of one network, in execution order: it keeps the network's γ and its ledger."""

    def __init__(self, config: NFConfig) -> None:
        self.config = config
        has_gamma = config.standardize and config.gamma
        self.gamma = gain(config.activation, source=config.gains) if has_gamma else 1.0
        self.ledger = VarianceLedger(config.alpha, normalize=config.beta)

    def activation(self, *, inplace: bool = False) -> nn.Module:
        """A new module of the network's activation; `inplace` where that costs autograd nothing, which is for ReLU."""
        activation = make_activation(self.config.activation)
        if inplace and isinstance(activation, nn.ReLU):
            activation.inplace = True
        return activation

    def conv(self, in_channels: int, out_channels: int, kernel_size: int, **arguments: Any) -> ScaledWSConv2d:
        """A scaled weight-standardized convolution under the network's padding."""
        config = self.config
        conv = ScaledWSConv2d(
            in_channels, out_channels, kernel_size,
            padding=config.conv_padding(kernel_size, arguments.get("dilation", 1)), standardize=config.standardize,
            **arguments,
        )  # fmt: skip
        conv.gain.requires_grad_(config.filter_gains)
        return conv

    def block(
        self,
        plan: BlockPlan,
        width: int,
        *,
        groups: int = 1,
        middle: int = 1,
        gate: Literal["end", "inner"] = "end",
        pooled_shortcut: bool = False,
    ) -> PreActivationBlock:
        """The next block: 1×1 to `width`, `middle` grouped 3×3, 1×1 out; squeeze-excite where `gate` says.

        `pooled_shortcut` halves the resolution of a projection shortcut by averaging rather than by its stride.
        """
        config, gamma = self.config, self.gamma
        if width < 1:
            raise ValueError("width is too little for one group of a block's 3×3 convolutions")
        in_scale = gamma * self.ledger.enter_block(first_in_stage=plan.first_in_stage)
        branch_end: dict[str, Any] = {"out_scale": config.alpha, "skip_gain": config.skip_gain}
        end_gate = inner_gate = None
        if config.se_ratio and gate == "end":
            end_gate = SqueezeExcite.of_ratio(plan.out_channels, config.se_ratio, gate_scale=2.0, **branch_end)
            branch_end = {}
        elif config.se_ratio:
            inner_gate = SqueezeExcite.of_ratio(width, config.se_ratio, gate_scale=2.0)
        steps = [(plan.stride, plan.first_dilation)] + [(1, plan.dilation)] * (middle - 1)
        conv = [
            self.conv(plan.in_channels, width, 1, in_scale=in_scale),
            *(
                self.conv(width, width, 3, stride=stride, dilation=dilation, groups=groups, in_scale=gamma)
                for stride, dilation in steps
            ),
            self.conv(width, plan.out_channels, 1, in_scale=gamma, **branch_end),
        ]
        shortcut: nn.Module | None = None
        if plan.projects:
            pool = pooled_shortcut and (plan.stride > 1 or plan.dilation > 1)
            stride = 1 if pool else plan.stride
            shortcut = self.conv(plan.in_channels, plan.out_channels, 1, stride=stride, in_scale=in_scale)
            shortcut = nn.Sequential(AveragePool2d(plan.stride), shortcut) if pool else shortcut
        return PreActivationBlock(
            pre=[self.activation(inplace=index > 0) for index, _ in enumerate(conv)],
            conv=conv,
            shortcut=shortcut,
            gate=end_gate,
            inner_gate=inner_gate,
            drop_rate=plan.drop_rate,
            expected_variance=self.ledger.variance,
        )
