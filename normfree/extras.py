"""Optional packages: which extra of this package brings them, asked for before work begins rather than after."""

import importlib.util
from typing import Literal

Extra = Literal["charts", "export", "timm", "train"]
_MODULES: dict[Extra, tuple[str, ...]] = {
    "charts": ("altair", "vl_convert"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "timm": ("timm", "torchvision"),
    "train": ("accelerate", "altair", "PIL", "timm", "torchvision", "vl_convert"),
}


def require_extra(extra: Extra, what: str) -> None:
    """Raise ImportError, which says what to install, where `what` needs a package that is not there."""
    missing = [name for name in _MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} needs {', '.join(missing)}: pip install 'normfree[{extra}]'")
