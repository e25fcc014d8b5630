"""Deep networks without activation normalization, and the tools to see why they work."""

from normfree import models, nn, signal
from normfree.conversion import convert, load_converted
from normfree.exporting import export
from normfree.folding import fold
from normfree.models import (
    create_model,
    from_pretrained,
    from_timm,
    list_models,
    load_haiku,
    register_with_timm,
)
from normfree.nn import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, gain
from normfree.optim import param_groups
from normfree.signal import SignalError, SignalReport, characterize, compare

__version__ = "0.1.0"

__all__ = [
    "ScaledWSConv1d",
    "ScaledWSConv2d",
    "ScaledWSConv3d",
    "SignalError",
    "SignalReport",
    "characterize",
    "compare",
    "convert",
    "create_model",
    "export",
    "fold",
    "from_pretrained",
    "from_timm",
    "gain",
    "list_models",
    "load_converted",
    "load_haiku",
    "models",
    "nn",
    "param_groups",
    "register_with_timm",
    "signal",
]
