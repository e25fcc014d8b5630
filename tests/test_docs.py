"""Documents: every code block is run, every link leads somewhere, the site has every public name."""

import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from sphinx.util.inventory import InventoryFile

import normfree
import normfree.conversion
import normfree.training
from normfree.cli import main

ROOT = Path(__file__).parent.parent
SITE_ONLY = ("api", "changelog", "contributing", "index")
GUIDES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in SITE_ONLY]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES, *sorted((ROOT / "docs" / "results").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SLOW = ("make demo",)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


SHELL = [line.split("#")[0].strip() for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]


def test_no_other_language_is_left_untried():
    for page in PAGES:
        fences = re.findall(r"^```(\w*)\n.*?^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert set(fences) <= {"python", "sh"}, page.name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs")], "outputs are not kept: the site makes them"
    namespace = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(notebook), "exec"), namespace)


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=pytest.mark.slow) if line in SLOW else line for line in dict.fromkeys(SHELL)]
)
def test_shell_lines_run(line, tmp_path, monkeypatch):
    command, *arguments = shlex.split(line)
    if command == "normfree":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        main()
    elif line == "make test":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(r"^test:.*\n\t\$\(PYTEST\)", makefile, flags=re.MULTILINE)  # that is what is running
        assert "make test" in (ROOT / ".ci" / "run").read_text()
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


def test_links_and_pictures_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} refers to {target}"


def test_pages_of_results_show_their_tables_as_they_were_written():
    results = ROOT / "docs" / "results"
    pages = [page.read_text() for page in results.glob("*.md")]
    tables = list(results.glob("*/table.md"))
    assert tables
    for table in tables:
        folder = table.parent.name
        (page,) = [page for page in pages if f"--out docs/results/{folder}\n" in page]
        files = {path.name for path in table.parent.glob("*.*")}
        chosen_by_test = "trainings_by_test_accuracy.csv" in files
        mark = "\n*By the [earlier protocol](README.md#protocol): rates chosen by the test accuracy.*\n"
        assert f"--out docs/results/{folder}\n{mark if chosen_by_test else ''}" in page, folder
        assert table.read_text() in page, folder
        assert files >= {"results.csv", "chart.png"}
        assert files >= {"trainings.csv", "tests.csv"} or chosen_by_test


class _Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]


@pytest.fixture(scope="module")
def site():
    """The site as `make docs` builds it, which fails on a warning."""
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("not run by make: it would install everything first")
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ROOT / "docs" / "_build" / "html"


@pytest.mark.slow
def test_every_link_of_the_site_resolves(site):
    pages = {path: _Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 20
    for path, page in pages.items():
        for link in page.links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name} refers to {link}"
            if parts.fragment and target in pages and path.name not in ("genindex.html", "search.html"):
                assert parts.fragment in pages[target].anchors, f"{path.name} refers to {link}"


@pytest.mark.slow
def test_every_public_name_is_on_the_site(site):
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    listed = {name.rpartition(".")[2] for names in inventory.data.values() for name in names if "normfree." in name}
    for module in (normfree, normfree.nn, normfree.models, normfree.signal, normfree.conversion, normfree.training):
        assert set(module.__all__) <= listed, f"{module.__name__}: {set(module.__all__) - listed}"
