"""Deep networks without activation normalization, and the tools to see why they work."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from normfree.signal import SignalError, SignalReport, characterize, compare, sweep

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
    "sweep",
]

# Imported when they are asked for, so that the command line answers at once, to Ctrl-C too, while torch is imported.
_SUBMODULES = ("conversion", "errors", "exporting", "folding", "models", "nn", "optim", "signal")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"normfree.{name}")
    if name in __all__:
        for module in _SUBMODULES:
            found = getattr(importlib.import_module(f"normfree.{module}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module 'normfree' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "timm" in sys.modules:  # which then knows the networks at once
    importlib.import_module("normfree.models")
