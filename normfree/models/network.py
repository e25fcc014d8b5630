"""Base of the paper's networks: stem → stages → pooled head, with the interface that users of timm expect."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfree.images import IMAGENET_MEAN, IMAGENET_STD
from normfree.models.block_plan import BlockPlan
from normfree.models.config import NetworkConfig
from normfree.models.saved_network import SavedNetwork
from normfree.nn.scales import Scales
from normfree.nn.weight_pass import WeightPass


class Head(Scales):
    """(N, C, H, W) to (N, num_classes): global average, times γ of the last activation, dropout, [bias,] linear.

    `global_pool` is that of `NetworkConfig`; "" leaves out the pooling, for a network without a classifier:
    (N, C, H, W) to the same.
    """

    in_scale: Tensor
    fc: nn.Module

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        drop_rate: float,
        init_std: float,
        in_scale: float = 1.0,
        bias: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.init_std = init_std
        self.global_pool = "avg"
        self.drop = nn.Dropout(drop_rate)
        self.bias = bias
        self._register_scales(torch.empty(0), in_scale=in_scale)
        self.fc = nn.Identity()
        self.reset_classifier(num_classes, torch.empty(0))

    def reset_classifier(self, num_classes: int, like: Tensor) -> None:
        """A new classifier, on the device and in the dtype of `like`; none for 0 classes."""
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.channels, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(self.fc.weight, std=self.init_std)
            nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (N, num_classes), or with `pre_logits` the pooled features (N, C)."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        elif self.global_pool:
            greatest = x.amax((2, 3))
            x = greatest if self.global_pool == "max" else 0.5 * (greatest + x.mean((2, 3)))
        x = x * self.in_scale.to(x.dtype)
        if pre_logits:
            return x
        x = self.drop(x)
        return self.fc(x if self.bias is None else self.bias(x))


class ResidualNetwork(
    nn.Module,
    SavedNetwork,
    library_name="normfree",
    license="apache-2.0",
    pipeline_tag="image-classification",
    paper_url="https://arxiv.org/abs/2101.08692",
):
    """stem → stages → `final` (the last activation, with what the family has before it) → head.

    Input (N, in_channels, H, W) of any height and width, output (N, num_classes). The first `stem_tap` modules of the
    stem lead to half the resolution and are feature 0; the outputs of the stages, the residual stream as it is, are the
    others, at 1/4, 1/8, 1/16 and 1/32.

    The interface is timm's as far as it fits these networks, and that of huggingface_hub's mixin: `save_pretrained`,
    `from_pretrained` and `push_to_hub` keep configuration, weights and dtype.
    """

    def __init__(
        self,
        config: NetworkConfig,
        stem: Sequence[nn.Module],
        plans: Sequence[BlockPlan],
        blocks: Sequence[nn.Module],
        final: nn.Module,
        head: Head,
        *,
        stem_tap: int,
        stem_tap_channels: int,
    ) -> None:
        """`blocks` are those of `plans`, in the same order."""
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(*stem)
        channels = {plan.stage: plan.out_channels for plan in plans}
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*(block for block, plan in zip(blocks, plans, strict=True) if plan.stage == stage))
                for stage in channels
            )
        )
        self.final = final
        self.head = head
        head.global_pool = config.global_pool
        self.num_classes = config.num_classes
        self.num_features = self.head_hidden_size = head.channels
        self.grad_checkpointing = False
        self.stem_tap = stem_tap
        self.feature_info = [{"num_chs": stem_tap_channels, "reduction": 2, "module": f"stem.{stem_tap - 1}"}]
        self.feature_info += [
            {
                "num_chs": channels[stage],
                "reduction": min(4 * 2**stage, getattr(config, "output_stride", 32)),
                "module": f"stages.{stage}",
            }
            for stage in channels
        ]
        self.default_cfg = self.pretrained_cfg = default_cfg(config)
        self._weight_pass = WeightPass()

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, H/32, W/32): the last activation, before pooling and before its γ."""
        x = self.stem(x)
        for stage in self.stages:
            x = self._run_stage(stage, x)
        return self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, num_classes), or with `pre_logits` the pooled features (N, C), γ included."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, (N, in_channels, H, W) to (N, num_classes)."""
        if torch.compiler.is_compiling():
            return self.forward_head(self.forward_features(x))
        with self._weight_pass.opened(self):
            return self.forward_head(self.forward_features(x))

    def __prepare_scriptable__(self) -> nn.Module:
        """Give TorchScript the graph of the network, which it can read once the network is folded."""
        return torch.fx.symbolic_trace(self)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return what `forward_features` does and the features that are asked for, or these only.

        `indices` are those of `feature_info`, negative ones from the end; an int asks for the last so many, None for
        all. `stop_early` leaves out what no feature needs. There is no normalizer for `norm` to apply.

        Raises ValueError for an index that does not exist and for another `output_fmt` than "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be 'NCHW'")
        wanted = self._feature_indices(indices)
        features = {}
        for position, module in enumerate(self.stem):
            x = module(x)
            if position == self.stem_tap - 1:
                features[0] = x
        stages = self.stages[: max(wanted)] if stop_early else self.stages
        for index, stage in enumerate(stages, start=1):
            x = self._run_stage(stage, x)
            features[index] = x
        intermediates = [features[index] for index in wanted]
        return intermediates if intermediates_only else (self.final(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features of these indices do not need, and return the indices."""
        wanted = self._feature_indices(indices)
        self.stages = self.stages[: max(wanted)]
        if max(wanted) == 0:
            self.stem = self.stem[: self.stem_tap]
        if prune_norm or max(wanted) < len(self.feature_info) - 1:
            self.final = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def _feature_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            last = count if indices is None else indices
            if not 0 < last <= count:
                raise ValueError(f"indices is {indices}; there are {count} features")
            return list(range(count - last, count))
        wanted = [index + count if index < 0 else index for index in indices]
        if not wanted or not all(0 <= index < count for index in wanted):
            raise ValueError(f"indices is {indices}; there are {count} features, 0 to {count - 1}")
        return wanted

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return stage(x)
        for block in stage.children():
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Choose whether training keeps the input of each block only, and runs the block again in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer; an identity where there are no classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none), behind this pooling; None: as it is, and some for a classifier.

        Raises ValueError for a pooling that `NetworkConfig` does not have, and for a classifier without pooling.
        """
        if global_pool is None:
            global_pool = self.head.global_pool or ("avg" if num_classes else "")
        changed: dict[str, Any] = {"num_classes": num_classes, "global_pool": global_pool}
        config = dataclasses.replace(self.config, **changed)
        self.head.global_pool = global_pool
        self.head.reset_classifier(num_classes, next(self.parameters()))
        self.num_classes = num_classes
        self.config = self._hub_mixin_config = config

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for timm's layer-wise rates: the stem, each block (or stage if `coarse`), the head."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None)]}


def default_cfg(config: NetworkConfig) -> dict[str, Any]:
    """Describe, in timm's words, how images are prepared: resized bicubically to 32 pixels more than are cropped."""

    def crop(size: int) -> float:
        return size / (size + 32)

    return {
        "num_classes": config.num_classes,
        "input_size": (config.in_channels, config.train_size, config.train_size),
        "test_input_size": (config.in_channels, config.test_size, config.test_size),
        "crop_pct": crop(config.train_size),
        "test_crop_pct": crop(config.test_size),
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
    }
