"""Every code block of the README and the docs is run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from normfree.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "results").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


SHELL = [line.split("#")[0].strip() for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]


def test_all_languages_are_run():
    for page in PAGES:
        fences = re.findall(r"^```(\w*)\n.*?^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert set(fences) <= {"python", "sh"}, page.name


@pytest.mark.parametrize("line", SHELL)
def test_shell(line, tmp_path, monkeypatch):
    command, *arguments = shlex.split(line)
    if command == "normfree":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        main()
    elif line == "make test":
        pass  # that is what is running
    elif command == "make":
        if not (ROOT / ".venv" / "installed").exists():
            pytest.skip("not run by make: it would install everything first")
        assert arguments == ["demo"]
        report = ROOT / "normfree-report"
        for name in ("index.html", "index.png"):
            (report / name).unlink(missing_ok=True)  # of an earlier run
        done = subprocess.run(["make", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
        assert done.stdout.count("trained on digits 4 images at a time") == 3
        assert done.stdout.count("nf_resnet50 on") == 2
        assert (report / "index.html").stat().st_size > 500_000
        assert (report / "index.png").stat().st_size > 50_000
    else:
        assert (command, arguments[0]) == ("pip", "install")
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
        subprocess.run([*pip, *arguments[1:]], cwd=ROOT, check=True)


def test_links_and_pictures_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} refers to {target}"


def test_pages_of_results_show_their_tables_as_they_are():
    results = ROOT / "docs" / "results"
    pages = [page.read_text() for page in results.glob("*.md")]
    tables = list(results.glob("*/table.md"))
    assert tables
    for table in tables:
        folder = table.parent.name
        assert any(table.read_text() in page and f"--out docs/results/{folder}" in page for page in pages), folder
        assert {path.name for path in table.parent.glob("*.*")} >= {"trainings.csv", "results.csv", "chart.png"}
