"""Coverage of conversion: what it makes of other people's networks, docs/coverage.md.

    python -m normfree.studies.coverage --out docs/coverage.md [--networks timm:resnet18 …] [--seed 0]

Every network is built with random weights and converted on 16 images, white noise and photographs; what is measured
is its signal afterwards, with branches opened, beside the original's.
"""

import argparse
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from normfree.conversion import Conversion, convert
from normfree.files.whole import write_whole
from normfree.images import photographs
from normfree.nn import VarianceLedger
from normfree.signal import SignalRecord
from normfree.sources import model_factory
from normfree.trace.inputs import tensors

ALPHA = 0.2
LOWEST, HIGHEST = 0.25, 4.0  # of a join's variance over the ledger's
_BATCH = 16
_SIZES = {
    "timm:levit_128s": 224, "timm:visformer_tiny": 224, "timm:efficientformer_l1": 224, "timm:coatnet_pico_rw_224": 224,
}  # fmt: skip
_SIZE = 96

_TIMM = (
    "resnet18", "resnet26d", "resnext50_32x4d", "seresnet33ts", "ecaresnet26t", "skresnet18", "resnest14d",
    "resnetblur18", "resnetaa34d", "gcresnet33ts", "lambda_resnet26t", "resnetv2_50", "res2net50_26w_4s",
    "regnetx_002", "regnety_002", "regnetz_005", "gernet_s", "repvgg_a0", "mobileone_s0", "mobilevit_xxs",
    "tresnet_m", "efficientnet_b0", "efficientnetv2_rw_t", "tf_efficientnet_lite0", "mixnet_s", "fbnetc_100",
    "mnasnet_100", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small", "lcnet_050",
    "rexnet_100", "ghostnet_100", "repghostnet_050", "dla34", "dla46_c", "dpn48b", "hrnet_w18_small",
    "densenet121", "vovnet39a", "ese_vovnet19b_dw", "selecsls42", "darknet53", "cspresnet50", "inception_v3",
    "inception_resnet_v2", "xception41", "legacy_xception", "hgnet_tiny", "convmixer_768_32", "repvit_m0_9",
    "starnet_s1", "fasternet_t0", "inception_next_atto", "fastvit_t8", "efficientvit_b0", "levit_128s",
    "visformer_tiny", "efficientformer_l1", "coatnet_pico_rw_224", "nextvit_small", "shvit_s1",
)  # fmt: skip
_TORCHVISION = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "googlenet", "mnasnet0_5",
    "regnet_y_400mf", "vgg11_bn", "efficientnet_b0", "densenet121", "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large", "fcn_resnet50",
)  # fmt: skip
NETWORKS = (*(f"timm:{name}" for name in _TIMM), *(f"torchvision:{name}" for name in _TORCHVISION))


def image_size(network: str) -> int:
    """Return the height and width of the images that a network is measured on."""
    return _SIZES.get(network, _SIZE)


@dataclass(frozen=True)
class Row:
    """One network on one kind of images."""

    network: str
    removed: int
    kept: tuple[str, ...]
    joins: int
    lowest: float  # variance over the ledger's, over the joins
    highest: float
    after_projection: float  # largest squared mean over variance at a projection shortcut's join
    before_projection: float  # the same before the first of them
    originally: float  # there, before conversion
    growth: float  # of squared mean over variance within a stage, from its second join on
    original_growth: float
    finite: bool  # outputs and gradients, in training mode
    departure: float  # of a branch's variance from what it was set to

    @property
    def exceptions(self) -> list[str]:
        """Departures from what should be, in words."""
        words = []
        if self.joins and not self.lowest >= LOWEST:  # nor NaN
            words.append(f"variance {self.lowest:.2f} of the ledger's")
        if self.joins and not self.highest <= HIGHEST:
            words.append(f"variance {self.highest:.2f} times the ledger's")
        if self.after_projection >= 1:
            words.append(f"shift {self.after_projection:.2f} after a projection")
        if self.growth > max(0.1, self.original_growth):
            words.append(f"shift grows by {self.growth:.2f} within a stage")
        if self.departure > 0.02:
            words.append(f"branches {100 * self.departure:.0f} % off after four passes")
        if not self.finite:
            words.append("not finite")
        return words


def measure(network: str, kind: str, seed: int = 0) -> Row:
    """Convert a network on "noise" or "photographs" and look at its signal."""
    torch.manual_seed(seed)
    model = model_factory(network)()
    shape = (3, *[image_size(network)] * 2)
    images = torch.randn(_BATCH, *shape) if kind == "noise" else photographs(shape, _BATCH)
    conversion = convert(model, images, alpha=ALPHA)
    return _row(network, conversion, _finite(conversion.model, images))


def _row(network: str, conversion: Conversion, finite: bool) -> Row:
    after, before = (
        report.records if report.kind == "join" else () for report in (conversion.after, conversion.before)
    )
    ratios = [record.variance / expected for record, expected in zip(after, expected_variances(after), strict=True)]
    first = next((i for i, record in enumerate(after) if record.shortcut == "projection"), len(after))
    return Row(
        network=network,
        removed=sum(change.action == "removed" for change in conversion.changes),
        kept=tuple(f"{change.path}: {change.note}" for change in conversion.kept),
        joins=len(after),
        lowest=min(ratios, default=math.nan),
        highest=max(ratios, default=math.nan),
        after_projection=max((r.mean_to_variance for r in after if r.shortcut == "projection"), default=0.0),
        before_projection=max((r.mean_to_variance for r in after[:first]), default=0.0),
        originally=max((r.mean_to_variance for r in before[:first]), default=0.0),
        growth=max(_growths(after), default=0.0),
        original_growth=max(_growths(before), default=0.0),
        finite=finite,
        departure=conversion.departure,
    )


def expected_variances(records: Sequence[SignalRecord]) -> Iterator[float]:
    """The expected variance at every join: a stage or a projection begins anew."""
    variance, stage = VarianceLedger(ALPHA), 0
    for record in records:
        variance.enter_block(first_in_stage=record.stage != stage or record.shortcut == "projection")
        stage = record.stage
        yield variance.variance


def _growths(records: Sequence[SignalRecord]) -> Iterator[float]:
    """Yield by how much a stage's joins shift more than its second one. The first precedes an activation."""
    for _, stage in groupby(records, lambda record: record.stage):
        shifts = [record.mean_to_variance for record in stage][1:]
        if shifts:
            yield max(shifts) - shifts[0]


def _finite(model: nn.Module, images: Tensor) -> bool:
    outputs = [out for out in tensors(model.train()(images)) if out.is_floating_point()]
    torch.stack([out.square().mean() for out in outputs]).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return all(bool(t.isfinite().all()) for t in (*outputs, *gradients))


# ---- the page

_POOLED = (
    "The stem is pooled or blurred after its normalizer, which leaves little of the variance of white noise, and most "
    "of a photograph's; the joins before the first shortcut with weights inherit that."
)
_PARALLEL = (
    "Parallel branches are added to each other before they join the stream, and are found as joins of their own: "
    "together they have the variance α². The joins of the stream are where they should be."
)
_UNNORMALIZED = "The last block of a stage ends in a layer that no normalizer follows: it is left as it was."
_CORRELATED = " Their outputs are correlated, more or less after every pass."
EXPLAINED: dict[str, str] = {
    "timm:seresnet33ts": (
        "SiLU after every addition, as in the original, leaves less of the variance than a branch brings."
    ),
    "timm:resnetblur18": _POOLED,
    "timm:resnetaa34d": _POOLED,
    "timm:mobilevit_xxs": (
        "The streams of its transformers begin after an activation, which keeps a third of the variance, and their "
        "branches, which LayerNorm keeps small at initialisation, are left as they are."
    ),
    "timm:inception_resnet_v2": _POOLED + " Its streams have no other beginning: it has no shortcut with weights.",
    "timm:lambda_resnet26t": (
        "The two parts of a lambda layer, content and position, are added: that is no residual stream, and both come "
        "from the same convolution, whose scale cannot serve both. The joins of the stream are where they should be."
    ),
    "timm:repvgg_a0": (
        "Its normalizers' weights start at 0.1, so that with normalizers the signal is small too; conversion keeps "
        "gains. Streams are rectified after every block, and nothing centres them."
    ),
    "timm:mobileone_s0": _PARALLEL
    + _CORRELATED
    + (
        " Its blocks normalize the stream too, where conversion leaves an identity: a rectified stream that nothing "
        "centres."
    ),
    "timm:repghostnet_050": (
        "The end of a branch is a residual block itself, which is not scaled again: the variance grows by one with "
        "every block, as in a network with BatchNorm."
    ),
    "timm:hgnet_tiny": (
        "Its one residual block adds to a stream that a rectifier and a gate have made small, as in the original."
    ),
    "timm:convmixer_768_32": (
        "Its normalizers stand after the activations, on the stream itself: without them the stream is that of GELU's "
        "outputs, with a third of the variance and a mean."
    ),
    "timm:repvit_m0_9": _PARALLEL
    + _CORRELATED
    + (" Its squeeze-excite gates the stream itself, which the original then normalizes again."),
    "timm:fastvit_t8": _PARALLEL + " A stream that is normalized, with no layer before that, keeps its mean.",
    "timm:visformer_tiny": _UNNORMALIZED,
    "timm:coatnet_pico_rw_224": _UNNORMALIZED
    + (" Its transformers have LayerNorm, which is left as it is: squared means lie below those of the original."),
    "timm:hrnet_w18_small": (
        "Where resolutions are fused, equals are added, and their variances add up as in the original; the ledger has "
        "no fusions. A fused stream is rectified once more."
    ),
}
"""Why a network is not as it should be; one that is not and has no entry here fails the measurement."""


def render_page(rows: Sequence[tuple[Row, Row]], command: str) -> str:
    """docs/coverage.md: a line per network, on noise and on photographs, and what there is to say of some."""
    exceptions = [
        f"- `{noise.network}`: {_words(noise, photos)}. {EXPLAINED.get(noise.network, 'Unexplained.')}"
        for noise, photos in rows
        if noise.exceptions or photos.exceptions
    ]
    kept = [f"- `{noise.network}`: {'; '.join(noise.kept)}" for noise, _ in rows if noise.kept]
    return _PAGE.format(
        networks=len(rows), command=command, rows="\n".join(_line(*pair) for pair in rows),
        kept="\n".join(kept) or "None.", exceptions="\n".join(exceptions), batch=_BATCH, size=_SIZE, alpha=ALPHA,
    )  # fmt: skip


def _line(noise: Row, photos: Row) -> str:
    ratios = [f"{r.lowest:.2f} to {r.highest:.2f}" if r.joins else "no joins" for r in (noise, photos)]
    shifts = [f"{r.after_projection:.2f}" for r in (noise, photos)]
    stems = [f"{r.before_projection:.2f} ({r.originally:.2f})" for r in (noise, photos)]
    growths = [f"{r.growth:.2f} ({r.original_growth:.2f})" for r in (noise, photos)]
    cells = (f"`{noise.network}`", noise.removed, len(noise.kept), noise.joins, *ratios, *shifts, *growths, *stems)
    return "| " + " | ".join(map(str, cells)) + " |"


def _words(noise: Row, photos: Row) -> str:
    parts = [("on noise", noise.exceptions), ("on photographs", photos.exceptions)]
    return "; ".join(f"{where} {', '.join(words)}" for where, words in parts if words)


_PAGE = """# What conversion makes of {networks} networks

Written by `{command}`; a test measures some of them again.

Networks of timm and torchvision, each built with random weights and converted with α = {alpha} on {batch} images of
{size} pixels (224 where a network needs it), once of white noise and once of crops of photographs. Outputs and gradients
are finite in training mode unless the last section says otherwise.

- *variance*: the least and the greatest channel variance at a residual join, with branches opened, over that of the
  ledger: 1 at the start of a stage, and α² more with every block
- *shift*: the largest channel squared mean over variance, after shortcuts with weights
- *growth*: by how much that is larger later in a stage than at its second join, the first one that an activation
  precedes
- *stem*: its largest value before the first shortcut with weights, where the stem's rectifier and pooling set it

In parentheses is what it was with normalizers.

| network | removed | kept | joins | variance, noise | photographs | shift, noise | photographs | growth, noise | photographs | stem, noise | photographs |
|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

After an activation a stream keeps about a third of its variance, and a mean: where an activation follows the addition,
as in all ResNets but those of the second version, the joins of a stage that follow the first lie at 0.3 to 0.5.

## What stays

{kept}

## What is not as it should be

Outside of 0.25 to 4 times the ledger's variance; a shift above 1 after a shortcut with weights; a growth above 0.1 and
above the original's; branches more than 2 % off after four passes:

{exceptions}
"""  # noqa: E501


def main() -> None:
    """Measure, write the page, and fail where something is not as it should be and not explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for network in options.networks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of others' networks
            pair = [measure(network, kind, options.seed) for kind in ("noise", "photographs")]
        rows.append((pair[0], pair[1]))
        print(f"{_line(*rows[-1])} {_words(*rows[-1])}", flush=True)
    if options.out is not None:
        write_whole(options.out, render_page(rows, "python -m normfree.studies.coverage --out docs/coverage.md"))
    unexplained = [row.network for pair in rows for row in pair if row.exceptions and row.network not in EXPLAINED]
    if unexplained:
        raise SystemExit(f"not as they should be, and not explained: {', '.join(dict.fromkeys(unexplained))}")


if __name__ == "__main__":
    main()
