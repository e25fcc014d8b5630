"""Configuration that all networks of this package have."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from normfree.arguments import require_moderate
from normfree.files.documents import check_types

_CHOICES: dict[str, tuple[Any, ...]] = {
    "padding": ("same", "symmetric"), "global_pool": ("avg", "max", "avgmax", ""), "output_stride": (32, 16, 8),
}  # fmt: skip
_LEAST = {
    "num_classes": 0, "in_channels": 1, "train_size": 1, "test_size": 1, "group_size": 1, "middle": 1, "se_ratio": 0,
    "alpha": 0, "weight_decay": 0, "expansion": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The fields that all families have; each adds its own. A value that no network can have raises ValueError."""

    depths: tuple[int, ...]  # blocks per stage
    width: float  # multiplies the channels of the stages
    activation: str = "relu"  # a name of `normfree.nn.gains.ACTIVATIONS`
    drop_rate: float = 0.0  # dropout before the classifier
    stochastic_depth_rate: float = 0.1  # of the last block, growing linearly from 0
    num_classes: int = 1000  # 0: pooled features
    in_channels: int = 3
    global_pool: Literal["avg", "max", "avgmax", ""] = "avg"  # before the classifier; "avgmax": the mean of both
    padding: Literal["same", "symmetric"] = "same"  # "same" is the authors' (TensorFlow's); "symmetric" is PyTorch's
    train_size: int = 224  # pixels
    test_size: int = 256
    weight_decay: float = 5e-5  # without gains, biases, skip gains and the scales of normalizers

    def __post_init__(self) -> None:
        check_types(self)
        numbers = {name: value for name, value in dataclasses.asdict(self).items() if isinstance(value, int | float)}
        require_moderate(**numbers)
        for name, least in _LEAST.items():
            value = getattr(self, name, least)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name in ("depths", "widths"):
            values = getattr(self, name, (1,))
            if not values or min(values) < 1:
                raise ValueError(f"{name} is {values}; it must be at least 1 for each stage")
        for name in ("drop_rate", "stochastic_depth_rate"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be in [0, 1)")
        if int(16 * self.width) < 1:
            raise ValueError(f"width is {self.width}; it must be at least 1/16, for a stem of one channel")
        self._check_choices()

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name, choices[0])
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
        if self.global_pool == "" and self.num_classes:
            raise ValueError(f"global_pool is ''; without pooling num_classes must be 0, not {self.num_classes}")

    def conv_padding(self, kernel_size: int, dilation: int = 1) -> int | str:
        """The padding of a convolution under `padding`."""
        return "same" if self.padding == "same" else dilation * (kernel_size // 2)
