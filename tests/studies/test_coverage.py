"""Claims of docs/coverage.md on other people's networks, measured again for some."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from normfree.studies.coverage import EXPLAINED, NETWORKS, measure, render_page
from tests.helpers import slow_but

MEASURED = ["timm:resnetv2_50", "timm:efficientnet_b0", "timm:dla34", "timm:fbnetc_100"]
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


@pytest.mark.parametrize("kind", ["noise", "photographs"])
@pytest.mark.parametrize(
    "network",
    slow_but({"timm:fbnetc_100"}, ["timm:resnetv2_50", "timm:efficientnet_b0", "timm:dla34", "timm:fbnetc_100"]),
)
def test_the_signal_is_where_the_ledger_says(network, kind):
    row = measure(network, kind)
    assert not row.kept
    assert row.exceptions == [], row


def test_the_page_has_every_network_and_explains_every_exception():
    text = PAGE.read_text()
    listed = re.findall(r"^\| `([\w:]+)` \|", text, flags=re.MULTILINE)
    assert listed == list(NETWORKS)
    assert len(NETWORKS) >= 60
    _, _, exceptions = text.partition("## What is not as it should be")
    assert set(re.findall(r"^- `([\w:]+)`", exceptions, flags=re.MULTILINE)) == set(EXPLAINED)
    assert "Unexplained" not in text


def test_what_is_not_as_it_should_be_is_said():
    good = measure("torchvision:mobilenet_v2", "noise")
    assert good.exceptions == []
    bad = replace(good, network="n", lowest=0.1, highest=5.0, after_projection=1.5, growth=0.5, finite=False,
                  departure=0.3, kept=("bn: excluded",))  # fmt: skip
    assert len(bad.exceptions) == 6
    text = render_page([(good, good), (bad, good)], "command")
    assert "- `n`: on noise variance 0.10 of the ledger's, variance 5.00 times" in text
    assert "not finite. Unexplained." in text
    assert "- `n`: bn: excluded" in text
    assert "`torchvision:mobilenet_v2`: " not in text
