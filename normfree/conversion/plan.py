"""The plan of a conversion: the modules that are replaced, by path, and as a text that can be followed again."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from normfree.files.documents import document_text, from_values, parse_document

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
    statistics: bool = False  # the normalizer's, in eval mode, stay with its scale and shift
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
        return document_text(dataclasses.asdict(self), format=FORMAT, indent=None)

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "the text") -> "Plan":
        """Read a plan. Raises ValueError that begins with `name` for none, a changed one, or another format."""
        values = parse_document(text, "plan of a conversion", name, format=FORMAT)
        parts: dict[str, type[PlannedLayer | RemovedNorm]] = {"layers": PlannedLayer, "removed": RemovedNorm}
        try:
            made = {name: tuple(from_values(part, one) for one in values[name]) for name, part in parts.items()}
            return from_values(cls, values | made)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is no plan of a conversion ({error!r})") from error
