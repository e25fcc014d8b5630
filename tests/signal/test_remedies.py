"""Every verdict on a problem has a remedy, which a page explains, and following it removes the verdict."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import normfree
from normfree.nn import ScaledWSConv2d
from normfree.signal.remedies import Verdict


class Block(nn.Module):
    def __init__(self, conv, *, norm=None, scale=1.0):
        super().__init__()
        self.norm = norm or nn.Identity()
        self.conv = conv
        self.scale = scale

    def forward(self, x):
        return x + self.scale * self.conv(torch.relu(self.norm(x)))


def plain_conv(std=None):
    conv = nn.Conv2d(32, 32, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight) if std is None else nn.init.normal_(conv.weight, std=std)
    return conv


def scaled_conv(out_scale=0.2):
    return ScaledWSConv2d(32, 32, 3, padding=1, in_scale=normfree.gain("relu"), out_scale=out_scale)


def network(blocks):
    standardized = isinstance(blocks[0].conv, ScaledWSConv2d)
    return nn.Sequential((ScaledWSConv2d if standardized else nn.Conv2d)(3, 32, 3, padding=1), *blocks)


def chain(make, depth=12):
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), *(nn.Sequential(nn.ReLU(), make()) for _ in range(depth))
    )  # fmt: skip


def converted(model):
    return normfree.convert(model, IMAGES).model


def with_infinite_weight():
    model = network([Block(plain_conv())])
    model[1].conv.weight.data[0] = torch.inf
    return model


def closed():
    conv = plain_conv()
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return network([Block(conv), Block(scaled_conv())])


def resnet(**arguments):
    return normfree.create_model("nf_resnet26", width=0.5, **arguments)


def retrained():
    """Make one of our networks, one branch of which has learned to be large."""
    model = resnet()
    model.stages[1][0].conv[2].gain.data.mul_(10)
    return model


def trained():
    """Make a network whose filters blur what was blurred before."""
    model = chain(plain_conv, depth=3)
    for conv in (block[1] for block in model[1:]):
        conv.weight.data.abs_()
    return model


IMAGES = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def deep(make, norm=None, depth=16):
    return lambda: network([Block(make(), norm=norm and norm(32)) for _ in range(depth)])


def loud_norm(channels):
    norm = nn.BatchNorm2d(channels)
    nn.init.constant_(norm.weight, 4.0)
    return norm


def paper(name):
    return lambda: normfree.create_model(name, width=0.25)


def after_conversion(make):
    return lambda: converted(make())


GROWING = deep(plain_conv)
NORMALIZED = deep(plain_conv, loud_norm)
CASES = {
    "explodes without normalizers": ("nothing normalizes", GROWING, deep(scaled_conv)),
    "drifts without normalizers": ("activations drift", GROWING, deep(scaled_conv)),
    "explodes with normalizers": ("bound the branches, not their sum", NORMALIZED, after_conversion(NORMALIZED)),
    "drifts with normalizers": (
        "centers the branches, not the shortcut",
        lambda: torchvision.models.resnet18(),
        after_conversion(lambda: torchvision.models.resnet18()),
    ),
    "explodes with standardized weights": (
        "not scaled down as they add up",
        deep(lambda: scaled_conv(1.5), depth=60),
        deep(scaled_conv, depth=60),
    ),
    "vanishes": (
        "the signal vanishes",
        lambda: chain(lambda: plain_conv(0.01)),
        lambda: chain(lambda: scaled_conv(1.0)),
    ),
    "grows and is reset": (
        "grows linearly within a stage",
        paper("bn_resnet50"),
        after_conversion(paper("bn_resnet50")),
    ),
    "is not finite": ("not finite", with_infinite_weight, deep(scaled_conv, depth=1)),
    "has closed branches": ("cannot be opened", closed, deep(scaled_conv, depth=2)),
    "departs from its ledger": (
        "departs from the prediction",
        retrained,
        resnet,
    ),
    "departs from its prediction": (
        "departs from its prediction",
        trained,
        lambda: chain(plain_conv, depth=3),
    ),
}


def verdicts(model):
    return normfree.characterize(model, IMAGES, predict=True).verdicts


@pytest.mark.parametrize("name", CASES)
def test_following_the_remedy_removes_the_verdict(name):
    words, broken, mended = CASES[name]
    torch.manual_seed(0)
    (verdict,) = [verdict for verdict in verdicts(broken()) if words in verdict]
    assert verdict.is_problem
    page, section = verdict.page.split("#")
    headings = re.findall(r"^#+ (.*)$", (Path("docs") / page).read_text(), flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert section in slugs
    torch.manual_seed(0)
    assert not [verdict for verdict in verdicts(mended()) if words in verdict]


def test_whatever_goes_wrong_has_a_remedy_in_the_table_and_good_news_has_none():
    torch.manual_seed(0)
    report = normfree.characterize(CASES["explodes without normalizers"][1](), IMAGES)
    text = str(report)
    assert text.count("to mend it:") == 1  # one remedy for both verdicts
    for verdict in verdicts(CASES["explodes without normalizers"][2]()):
        assert not verdict.is_problem


def test_a_summary_has_verdicts_remedies_and_the_worst_places(tmp_path):
    torch.manual_seed(0)
    report = normfree.characterize(GROWING(), IMAGES)
    text = report.save(tmp_path / "spp.md").read_text()
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    assert [part.splitlines()[0] for part in parts[1:]] == ["Verdicts", "What to try", "The worst 5 joins"]
    assert report.verdicts[0] in parts[1]
    assert parts[2].count("\n- ") == 1
    assert parts[3].index("`16`") < parts[3].index("`15`") < parts[3].index("`12`")  # the variance grows
    one = normfree.characterize(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGES).save(tmp_path / "one.md").read_text()
    assert "What to try" not in one
    assert "The worst 1 weight layers" in one


def test_verdicts_are_strings_that_can_be_copied():
    verdict = Verdict("it drifts", "mend it", "convert.md")
    for again in (copy.deepcopy(verdict), pickle.loads(pickle.dumps(verdict))):
        assert (again, again.remedy, again.page) == ("it drifts", "mend it", "convert.md")
