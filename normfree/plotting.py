"""Colours that all charts share, and how a Vega-Lite specification becomes a file."""

from pathlib import Path
from typing import Any

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]


def altair() -> Any:
    """The module. Raises ImportError without the extra "charts"."""
    try:
        import altair
    except ImportError as error:
        raise ImportError(f"charts need altair and vl-convert: pip install 'normfree[charts]' ({error})") from error
    return altair


def vl_convert() -> Any:
    """The module. Raises ImportError without the extra "charts"."""
    try:
        import vl_convert
    except ImportError as error:
        raise ImportError(f"charts need altair and vl-convert: pip install 'normfree[charts]' ({error})") from error
    return vl_convert


def write_chart(spec: dict[str, Any], path: Path) -> Path:
    """A chart as .png, .svg or .html (one file that needs no network). Raises ValueError for another suffix."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        path.write_bytes(vl_convert().vegalite_to_png(spec, scale=2))
    elif suffix == ".svg":
        path.write_text(vl_convert().vegalite_to_svg(spec), encoding="utf-8")
    elif suffix == ".html":
        path.write_text(vl_convert().vegalite_to_html(spec, bundle=True), encoding="utf-8")
    else:
        raise ValueError(f"cannot write {path}: the suffix must be .png, .svg or .html")
    return path
