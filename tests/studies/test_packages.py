"""The table of other packages' networks: what it says of each, and that it says so of all."""

import re
from pathlib import Path

import pytest
import torch

from normfree.conversion import Change
from normfree.files.csv_tables import read_csv
from normfree.studies import packages
from normfree.studies.package_networks import EXPLAINED, NETWORKS
from normfree.studies.packages import exceptions_of, main, measure, render_page

DOCS = Path(__file__).parents[2] / "docs"
BY_NAME = {network.name: network for network in NETWORKS}


def test_the_page_is_that_of_the_table_and_explains_every_exception():
    columns, rows = read_csv(DOCS / "packages.csv")
    assert columns == packages._COLUMNS
    assert len(rows) >= 160
    assert {row["network"] for row in rows} <= BY_NAME.keys()
    assert len(BY_NAME) == len(NETWORKS)
    text = (DOCS / "packages.md").read_text()
    assert text == render_page(rows)
    assert "Unexplained" not in text
    assert {row["network"] for row in rows if exceptions_of(row)} <= EXPLAINED.keys()


def test_the_packages_that_were_measured_are_pinned():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (DOCS / "packages.txt").read_text(), flags=re.MULTILINE))
    _, rows = read_csv(DOCS / "packages.csv")
    for row in rows:
        assert pinned[BY_NAME[row["network"]].distribution] == row["version"], row["network"]


def test_a_network_is_measured_both_ways(tmp_path, capsys):
    row = measure(BY_NAME["timm:resnet10t"])
    assert (row.removed, row.kept, row.function_kept, row.affine, row.step) == (14, 0, 0, 0, "yes")
    assert float(row.difference) < 1e-4
    assert float(row.export) < 1e-4
    lowest, highest = map(float, row.variance.split(" to "))
    assert 0.2 < lowest < highest < 1.1


def test_rows_of_what_is_not_installed_stay(monkeypatch, tmp_path):
    one, other = BY_NAME["timm:resnet10t"], BY_NAME["torchvision:resnet18"]
    monkeypatch.setattr(packages, "NETWORKS", (one, other))
    monkeypatch.setattr(packages, "measure", lambda network: packages._refused(network, ValueError("not | now")))
    out = tmp_path / "p.csv"
    monkeypatch.setattr("sys.argv", ["packages", "--out", str(out)])
    main()
    monkeypatch.setattr("sys.argv", ["packages", "--out", str(out), "--networks", "timm:*"])
    main()
    assert [row["network"] for row in read_csv(out)[1]] == ["timm:resnet10t", "torchvision:resnet18"]
    assert "not converted (ValueError: not | now)" in out.with_suffix(".md").read_text()
    monkeypatch.setattr("sys.argv", ["packages", "--out", str(out), "--networks", "x:*"])
    with pytest.raises(SystemExit, match=r"no network is called x:\*"):
        main()


def test_reasons_are_counted():
    kept = [
        Change("a", "BatchNorm2d", "kept", "normalizes the output of b: excluded"),
        Change("c", "BatchNorm2d", "kept", "normalizes the output of d: excluded"),
        Change("e", "BatchNorm2d", "kept", "did not run on these inputs"),
    ]
    assert packages._reasons(kept) == "2 × excluded; 1 × did not run on these inputs"


def test_what_fails_is_said_in_its_words():
    assert packages._tried(lambda: torch.zeros(1)[3]).startswith("IndexError: index 3 is out of bounds")
    good = {
        "kept": "0",
        "variance": "1 to 1",
        "departure": "0%",
        "difference": "1e-06",
        "step": "yes",
        "export": "0e+00",
    }
    assert exceptions_of(good) == []
    bad = {
        "kept": "2",
        "variance": "no joins",
        "departure": "5%",
        "difference": "1e-02",
        "step": "E: x",
        "export": "E: y",
    }
    assert exceptions_of(bad) == [
        "2 normalizers stay", "branches 5% off", "outputs differ by 1e-02", "step: E: x", "export: E: y",
    ]  # fmt: skip
    assert exceptions_of(bad | {"variance": ""}) == ["not converted"]
