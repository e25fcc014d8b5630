"""Colours that all charts share, and how a Vega-Lite specification becomes a file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from normfree.errors import ChartError
from normfree.extras import require_extra
from normfree.files.whole import write_whole

try:
    import resource
except ImportError:  # Windows, which has no such limits
    resource = None  # type: ignore[assignment]

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]


def altair() -> Any:
    """The module. Raises ImportError without the extra "charts"."""
    require_extra("charts", "a chart")
    import altair

    return altair


def render(function: str, **arguments: Any) -> Any:
    """Call a function of vl-convert.

    Where virtual memory is limited (ulimit -v) it may end the process, so another one calls it. Raises ImportError
    without the extra "charts", ChartError where the other process ended.
    """
    require_extra("charts", "a chart")
    limit = None if resource is None else resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit in (None, -1):
        import vl_convert

        return getattr(vl_convert, function)(**arguments)
    done = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS],
        input=json.dumps([function, arguments]).encode(),
        capture_output=True,
    )
    if done.returncode:
        raise ChartError(
            f"no chart is drawn: its engine takes more virtual memory than the {limit:,} bytes of ulimit -v"
        )
    return done.stdout if function.endswith("png") else done.stdout.decode()


_IN_ANOTHER_PROCESS = """
import json, sys, vl_convert
function, arguments = json.load(sys.stdin)
drawn = getattr(vl_convert, function)(**arguments)
sys.stdout.buffer.write(drawn if isinstance(drawn, bytes) else drawn.encode())
"""


def write_chart(spec: dict[str, Any], path: Path) -> Path:
    """A chart as .png, .svg or .html (one file that needs no network).

    Raises ValueError for another suffix, what `render` raises, and OSError where it cannot be written; the file before
    is then as it was.
    """
    suffix = path.suffix.lower()
    if suffix == ".png":
        write_whole(path, render("vegalite_to_png", vl_spec=spec, scale=2))
    elif suffix == ".svg":
        write_whole(path, render("vegalite_to_svg", vl_spec=spec))
    elif suffix == ".html":
        write_whole(path, render("vegalite_to_html", vl_spec=spec, bundle=True))
    else:
        raise ValueError(f"cannot write {path}: the suffix must be .png, .svg or .html")
    return path
