"""Rules of the architecture."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import normfree

PACKAGE = Path(normfree.__file__).parent
# The floors, bottom up: what each may import of the package besides itself; nothing points back.
GROUND = {"errors", "files", "images", "plotting"}
FLOORS = {
    **{part: {"errors"} for part in GROUND},
    "nn": set(),
    "trace": {"errors"},
    "signal": GROUND | {"trace", "training"},
    "models": GROUND | {"nn"},
    "folding": {"nn"},
    "conversion": GROUND | {"nn", "signal", "trace"},
    "exporting": {"folding"},
    "privacy": {"conversion", "nn"},
    "sources": {"models", "errors"},
    "training": GROUND | {"conversion", "models", "signal", "sources", "trace"},
    "benchmarks": GROUND | {"conversion", "folding", "models", "nn", "signal", "sources", "trace"},
    "studies": GROUND | {"conversion", "models", "nn", "signal", "sources", "trace", "training"},
    "cli": GROUND
    | {"benchmarks", "conversion", "exporting", "models", "signal", "sources", "studies", "trace", "training"},
    "__init__": {"conversion", "exporting", "folding", "models", "nn", "signal"},
    "__main__": {"cli"},
}
TORCH_ONLY = ("nn/", "trace/")
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "normfree":
                yield from (f"normfree.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "normfree" and rest:
            assert rest[0] in FLOORS[part] | {part}, f"{relative} imports {name}"
        if any(str(relative).startswith(place) for place in TORCH_ONLY) and top not in sys.stdlib_module_names:
            allowed = ("torch", "normfree", "triton" if str(relative) == "nn/fused.py" else "torch")
            assert top in allowed, f"{relative} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_have_a_docstring_and_one_size(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)) or not source.strip(), "no docstring says what lives here"
    assert source.count("\n") <= 360, "is it still one subject?"


def test_public_functions_have_docstrings():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                has_doc = ast.get_docstring(node) or any(
                    isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__doc__" for n in node.body
                )
                assert has_doc, f"{path.name}: {node.name}"


def test_importing_the_package_is_light():
    """Charts, timm and the command line's packages are imported when they are needed."""
    heavy = ("altair", "timm", "tyro", "torchvision", "rich")
    code = f"import normfree, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    names = {
        "convert",
        "characterize",
        "SignalReport",
        "compare",
        "create_model",
        "fold",
        "gain",
        "list_models",
        "ScaledWSConv2d",
    }
    assert names <= set(normfree.__all__)
    assert all(hasattr(normfree, name) for name in normfree.__all__)
