"""The plan of a conversion: the modules that are replaced, by path, and as a text that can be followed again."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from normfree.files import check_format

FORMAT = 1
"""Number of the text's format; it grows when a plan is written that earlier versions cannot follow."""


@dataclass(frozen=True)
class Change:
    """Action on one layer, and the reason for it."""

    path: str
    layer: str  # its class
    action: Literal["replaced", "removed", "kept"]
    note: str = ""


@dataclass(frozen=True)
class PlannedLayer:
    """Replacement of one weight layer."""

    path: str
    norm: str | None  # path of the normalizer whose scale and shift become its gain and bias
    bias: bool
    skip_gain: bool
    standardize: bool
    written: bool = False  # its class pads or crops around what torch's layer computes


@dataclass(frozen=True)
class RemovedNorm:
    """Removal of one normalizer."""

    path: str
    copied: bool  # what follows writes into its input, which others need
    affine: bool = False  # a `ChannelAffine` does what it did in eval mode


@dataclass(frozen=True)
class Plan:
    """Modules that are replaced in a network, by path."""

    layers: tuple[PlannedLayer, ...]
    removed: tuple[RemovedNorm, ...]
    settled: tuple[str, ...]  # activations that no longer write into their input, since others need it now

    def to_json(self) -> str:
        """Write the plan as `from_json` reads it."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan. Raises ValueError for a text that is none, or of another format."""
        try:
            plan: dict[str, Any] = json.loads(text)
            check_format(plan, FORMAT, "the plan of the conversion")
            layers = tuple(PlannedLayer(**layer) for layer in plan["layers"])
            return cls(layers, tuple(RemovedNorm(**norm) for norm in plan["removed"]), tuple(plan["settled"]))
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"it holds no plan of a conversion ({error!r})") from error
