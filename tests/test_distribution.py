"""The wheel: what it holds, and how a user's type checker sees it."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USER_PROGRAM = """
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import normfree
from normfree.signal import SignalMonitor

conv = normfree.ScaledWSConv2d(3, 8, kernel_size=3, padding="same", in_scale=normfree.gain("relu"))
model: nn.Module = normfree.create_model("nf_resnet50", num_classes=10)
report: normfree.SignalReport = normfree.characterize(model, torch.randn(2, 3, 64, 64), seeds=1)
largest: float = max(record.variance for record in report)
verdicts: Sequence[str] = report.verdicts
remedy: str = report.verdicts[0].remedy
free: nn.Module = normfree.convert(model, torch.randn(2, 3, 64, 64), keep="weights").model
weight: Tensor = conv.effective_parameters()[0]
with SignalMonitor(model, every=10) as monitor:
    rows = monitor.rows
"""
MISTAKES = {
    'normfree.ScaledWSConv2d("three", 8, 3)': 'incompatible type "str"',
    "normfree.ScaledWSConv2d(3, 8, kernel=3)": 'Unexpected keyword argument "kernel"',
    'normfree.convert(model, None, keep="wieghts")': "incompatible type",
    "number: int = normfree.characterize(model).verdicts": "Incompatible types in assignment",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """An sdist, and the wheel that is made from it."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def python(distributions, tmp_path_factory):
    """The Python of an environment that has the wheel installed, and sees this one's other packages."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder, with_pip=False)
    found = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    here = sysconfig.get_path("purelib")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(found), str(distributions[1])],
        check=True,
    )
    (found / "others.pth").write_text(here + "\n")
    return folder / "bin" / "python"


def errors(python, program, folder):
    """Lines of what mypy says of a program, strictly; what it knows of torch is kept in the folder."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--strict", "--config-file="]
    done = subprocess.run([*command, "program.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_the_wheel_holds_the_package_alone_and_says_that_it_is_typed(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = wheel.namelist()
    assert "normfree/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"normfree"}
    assert {name for name in names if name.endswith(".py")} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "normfree").rglob("*.py")
    }


def test_the_sdist_holds_tests_and_documents(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
        "tests/helpers.py",
        "docs/signal.md",
    } <= names
    assert not [name for name in names if name.startswith(("docs/_build", ".venv", "runs/"))]


def test_the_installed_package_is_what_runs(python, tmp_path):
    code = "import normfree; print(normfree.__file__, normfree.list_models('nf_resnet5*'))"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(python.parents[1]) in done.stdout
    assert "nf_resnet50" in done.stdout


def test_a_users_program_type_checks_against_the_wheel_and_its_mistakes_are_found(python, tmp_path):
    assert errors(python, USER_PROGRAM, tmp_path) == []
    found = errors(python, USER_PROGRAM + "\n".join(MISTAKES), tmp_path)
    assert len(found) == len(MISTAKES), found
    for line, words in zip(found, MISTAKES.values(), strict=True):
        assert words in line
