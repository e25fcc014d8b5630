"""Configuration of the documentation's site: `make docs`."""

import dataclasses
import inspect
import re
from typing import Any

import normfree

project = "normfree"
author = "the authors of normfree"
release = version = normfree.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "results/*/table.md"]

html_theme = "furo"
html_title = "normfree"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"

nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autoclass_content = "both"
napoleon_google_docstring = True
napoleon_use_ivar = True


def _field_comments(cls: type) -> dict[str, str]:
    """Read the comments behind a dataclass' fields, which say what each is."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found = re.findall(r"^    (\w+):[^#\n]*  # (.*)$", inspect.getsource(base), flags=re.MULTILINE)
            comments |= dict(found)
    return comments


def _add_fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """List a dataclass' fields with their comments below its docstring."""
    if what != "class" or not dataclasses.is_dataclass(obj):
        return
    comments = _field_comments(obj)
    described = [f for f in dataclasses.fields(obj) if f.name in comments]
    for field in described:
        lines += ["", f":ivar {field.name}: {comments[field.name]}"]


def setup(app: Any) -> None:
    """Connect the hooks of this file."""
    app.connect("autodoc-process-docstring", _add_fields)
