"""Rules of the architecture."""

import ast
import graphlib
import importlib
import itertools
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import normfree

PACKAGE = Path(normfree.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
}
TRITON = {"normfree.nn.fused", "normfree.nn.fused_kernels"}
IMPORTABLE = sorted(MODULES.keys() - TRITON - {"normfree.__main__"})

# The floors, bottom up: what each may import of the package besides itself; nothing points back.
GROUND = {"_torch", "arguments", "errors", "extras", "files", "images", "optim", "plotting"}
FLOORS = {
    **{part: {"_torch", "arguments", "errors", "extras", "files"} for part in GROUND},
    "nn": {"_torch", "arguments"},
    "trace": {"_torch", "errors"},
    "signal": GROUND | {"trace"},
    "models": GROUND | {"nn"},
    "folding": {"arguments", "nn"},
    "conversion": GROUND | {"folding", "nn", "signal", "trace"},
    "exporting": {"arguments", "extras", "files", "folding", "trace"},
    "privacy": {"nn"},
    "sources": {"errors", "models"},
    "training": GROUND | {"conversion", "models", "nn", "signal", "sources", "trace"},
    "benchmarks": GROUND | {"conversion", "folding", "models", "nn", "signal", "sources", "trace"},
    "studies": GROUND
    | {"benchmarks", "conversion", "folding", "models", "nn", "privacy", "signal", "sources", "trace", "training"},
    "cli": GROUND
    | {"benchmarks", "conversion", "exporting", "models", "signal", "sources", "studies", "trace", "training"},
    "__init__": {"conversion", "exporting", "folding", "models", "nn", "optim", "signal"},
    "__main__": {"cli"},
}
TORCH_ONLY = ("nn", "trace")
PRIVATE = ("torch._C", "torch.utils._", "torch._dynamo", "torch._subclasses", "_has_any_global_hook", "._cdata")


def imported(path):
    """Yield the modules that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def functions(path):
    """Yield every function of a file."""
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def relative(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "normfree" and rest:
            assert rest[0] in FLOORS[part] | {part}, f"{relative(path)} imports {name}"
        if part in TORCH_ONLY and top not in sys.stdlib_module_names:
            allowed = {"torch", "normfree"} | ({"triton"} if path.stem.startswith("fused") else set())
            assert top in allowed, f"{relative(path)} imports {name}"


def test_no_imports_go_in_a_circle():
    graph = {name: set(imported(path)) & MODULES.keys() - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_two_files_have_names_that_can_be_confused():
    names = [path.stem for path in FILES if path.parent.name != "cli" and not path.stem.startswith("__")]
    for a, b in itertools.combinations(sorted(names), 2):
        differ = sum(x != y for x, y in zip(a, b, strict=False)) if len(a) == len(b) else 2
        longer, shorter = sorted((a, b), key=len, reverse=True)
        dropped = {longer[:i] + longer[i + 1 :] for i in range(len(longer))}
        assert differ > 1, f"{a}.py and {b}.py"
        assert shorter not in dropped, f"{a}.py and {b}.py"


def test_no_public_name_hides_a_module():
    found = {name for _, name, _ in pkgutil.walk_packages(normfree.__path__, "normfree.")}
    assert found == MODULES.keys() - {"normfree"}
    for name in IMPORTABLE:
        importlib.import_module(name)
    for name in IMPORTABLE:
        place = normfree
        for part in name.split(".")[1:]:
            place = getattr(place, part)
        assert place is sys.modules[name], f"{name} is hidden by {place!r}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_say_what_they_are_and_keep_to_one_subject(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "no docstring says what lives here"
    assert source.count("\n") <= 330, "is it still one subject?"
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path) if f.end_lineno - f.lineno >= 60}
    assert not long, f"{relative(path)}: {long} lines"


def test_names_that_torch_keeps_private_are_in_one_file():
    for path in FILES:
        if path.stem != "_torch":
            code = "\n".join(line.partition("#")[0] for line in path.read_text().splitlines())
            assert not [name for name in PRIVATE if name in code], relative(path)


OPAQUE = {
    "What",
    "Which",
    "How",
    "Of",
    "Those",
    "Whether",
    "Where",
    "When",
    "With",
    "Without",
    "For",
    "In",
    "If",
    "From",
}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_docstrings_start_with_a_noun_or_a_verb(path):
    tree = ast.parse(path.read_text())
    documented = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef))]
    for node in documented:
        text = ast.get_docstring(node)
        if text:
            assert text.split()[0].strip("`\"'(,:") not in OPAQUE, f"{relative(path)}: {text.splitlines()[0]}"


def test_importing_the_package_is_light_and_changes_nothing():
    """Charts, timm and the command line's packages are imported when they are needed."""
    heavy = ("altair", "timm", "tyro", "torchvision", "rich", "PIL", "accelerate", "torch._dynamo")
    code = (
        "import sys, torch; before = list(sys.meta_path), list(sys.path); import normfree; "
        f"print([m for m in {heavy} if m in sys.modules], before == (sys.meta_path, sys.path))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_public_names_are_what_the_documents_promise():
    assert set(normfree.__all__) == {
        "ScaledWSConv1d", "ScaledWSConv2d", "ScaledWSConv3d", "SignalError", "SignalReport", "characterize", "compare",
        "convert", "create_model", "export", "fold", "from_pretrained", "from_timm", "gain", "list_models",
        "load_converted", "load_haiku", "models", "nn", "param_groups", "register_with_timm", "signal",
        "sweep",
    }  # fmt: skip
    assert all(hasattr(normfree, name) for name in normfree.__all__)
