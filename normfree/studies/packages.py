"""Coverage of packages: what conversion makes of the networks of those that are installed, docs/packages.md.

    python -m normfree.studies.packages --out docs/packages.csv [--networks GLOB …]

Rows of networks that are measured replace older ones, those of packages that are not installed stay; the page beside
the table is written from all. The packages, which this one does not need, are in docs/packages.txt.
"""

import argparse
import fnmatch
import importlib.metadata
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfree.conversion import Change, convert
from normfree.files.csv_tables import csv_text, read_csv
from normfree.files.whole import write_whole
from normfree.folding import fold, has_scaled_layers
from normfree.studies.coverage import expected_variances
from normfree.studies.package_networks import EXPLAINED, NETWORKS, Network
from normfree.trace.inputs import as_call, tensors


@dataclass(frozen=True)
class Row:
    """One network."""

    network: str
    version: str  # of its package
    removed: int
    kept: int
    why: str  # reasons of those that are kept, each once, with their number
    variance: str  # least and greatest at a residual join, over the ledger's
    departure: str  # of a branch's variance from what it was set to
    affine: int  # with keep="function", normalizers that became an affine map per channel
    function_kept: int  # with it, normalizers that stay
    difference: str  # with it, of an output from the original's
    step: str  # one step at batch 1, or what is in its way
    export: str  # difference of the exported program's outputs, or what is in its way


def measure(network: Network) -> Row:
    """Convert a network both ways, train one step at batch 1 and export it."""
    torch.manual_seed(0)
    model = network.build()
    inputs = network.inputs(8)
    conversion = convert(model, inputs)
    after = conversion.after
    ratios = [
        record.variance / expected
        for record, expected in zip(after.records, expected_variances(after.records), strict=True)
        if after.kind == "join"
    ]
    kept = convert(model, inputs, keep="function")
    return Row(
        network=network.name,
        version=importlib.metadata.version(network.distribution),
        removed=sum(change.action == "removed" for change in conversion.changes),
        kept=len(conversion.kept),
        why=_reasons(conversion.kept),
        variance=f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "no joins",
        departure=f"{conversion.departure:.0%}",
        affine=sum(change.note.startswith("by an affine map") for change in kept.changes),
        function_kept=len(kept.kept),
        difference=f"{kept.difference or 0:.0e}",
        step=_tried(lambda: _step(conversion.model, network)),
        export=_tried(lambda: _export(conversion.model, network.inputs(2))),
    )


def _refused(network: Network, error: Exception) -> Row:
    """Make the row of a network that is not converted."""
    why = f"not converted ({type(error).__name__}: {' '.join(str(error).split())})"
    nothing = dict.fromkeys(("variance", "departure", "difference", "step", "export"), "")
    version = importlib.metadata.version(network.distribution)
    return Row(network.name, version, removed=0, kept=0, why=why, affine=0, function_kept=0, **nothing)


def _reasons(kept: Iterable[Change]) -> str:
    """Join the reasons, paths left out, each with the number of normalizers that it keeps."""
    count: dict[str, int] = {}
    for change in kept:
        reason = change.note.partition(": ")[2] if change.note.startswith("normalizes the output") else change.note
        count[reason] = count.get(reason, 0) + 1
    return "; ".join(f"{number} × {reason}" for reason, number in count.items())


def _tried(function: Callable[[], str]) -> str:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0].strip()[:80]}"


def _step(model: nn.Module, network: Network) -> str:
    model.train()
    if network.train is not None:
        outputs = network.train(model)
    else:
        args, kwargs = as_call(network.inputs(1), model)
        outputs = [out for out in tensors(model(*args, **kwargs)) if out.is_floating_point() and out.requires_grad]
    torch.stack([out.float().square().mean() for out in outputs]).sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = all(bool(t.isfinite().all()) for t in (*outputs, *gradients))
    return "yes" if finite else "not finite"


def _export(model: nn.Module, inputs: Any) -> str:
    """Return the largest difference of the exported program's outputs, over the largest output."""
    folded = fold(model) if has_scaled_layers(model) else model.eval()
    args, kwargs = as_call(inputs, folded)
    with torch.no_grad():
        program = torch.export.export(folded, args, kwargs).module()
        pairs = list(zip(tensors(program(*args, **kwargs)), tensors(folded(*args, **kwargs)), strict=True))
    return f"{max((_difference(a, b) for a, b in pairs), default=math.nan):.0e}"


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30))


# ---- table and page

_COLUMNS = tuple(field.name for field in fields(Row))
_PAGE = """# What conversion makes of {count} networks of {packages} packages

Written by `python -m normfree.studies.packages --out docs/packages.csv`, which measures the networks of the packages
that are installed (`docs/packages.txt`) and keeps the other rows; versions are in the table beside this page.

Each network is new, its running statistics too, and is converted on eight images (signals, graphs, volumes; of
detectors two) of white noise. *variance*:
the least and the greatest channel variance at a residual join over that of the ledger. *off*: the largest departure of
a branch's variance from what it was set to. *affine*, *kept* and *difference*: with `keep="function"` the normalizers
that became an affine map per channel, those that stay, and the largest difference of an output from the original's,
over the largest. *step*: one step of training at batch 1, in training mode. *export*: the difference of the folded
network's program of `torch.export`. Where something is not done, the words are those of the error.

By their own trainers and losses converted networks of ultralytics, transformers, MONAI and torchvision are trained by
`examples/package_trainers.py`.

| network | removed | kept | variance | off | affine | kept | difference | step | export |
|---|---|---|---|---|---|---|---|---|---|
{rows}

## What stays, and why

{kept}

## What is not as it should be

Normalizers that stay, branches more than 2 % off, outputs that differ by more than 1e-4 of the largest, steps and
exports that fail:

{exceptions}
"""


def render_page(rows: Iterable[Mapping[str, str]]) -> str:
    """Write the page from the rows of the table."""
    rows = list(rows)
    names = [name for name in _COLUMNS if name not in ("version", "why")]
    lines = [
        "| " + " | ".join([f"`{row['network']}`", *(row[name].replace("|", "/") for name in names[1:])]) + " |"
        for row in rows
    ]
    kept = [f"- `{row['network']}`: {row['why']}" for row in rows if row["why"]]
    exceptions = [
        f"- `{row['network']}`: {', '.join(words)}. {EXPLAINED.get(row['network'], 'Unexplained.')}"
        for row in rows
        if (words := exceptions_of(row))
    ]
    packages = {row["network"].partition(":")[0] for row in rows}
    return _PAGE.format(
        count=len(rows), packages=len(packages), rows="\n".join(lines), kept="\n".join(kept) or "None.",
        exceptions="\n".join(exceptions) or "None.",
    )  # fmt: skip


def exceptions_of(row: Mapping[str, str]) -> list[str]:
    """Say what is not as it should be."""
    if not row["variance"]:
        return ["not converted"]
    words = [f"{row['kept']} normalizers stay"] if row["kept"] != "0" else []
    words += [f"branches {row['departure']} off"] if int(row["departure"].rstrip("%")) > 2 else []
    words += [f"outputs differ by {row['difference']}"] if float(row["difference"]) > 1e-4 else []
    words += [f"step: {row['step']}"] if row["step"] != "yes" else []
    exported = row["export"].replace("e", "").replace("-", "").replace("+", "").isdigit()
    words += [] if exported and float(row["export"]) <= 1e-4 else [f"export: {row['export']}"]
    return words


def main() -> None:
    """Measure, and write the table and the page after every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["*"], help="glob patterns of names, as timm:resnet*")
    parser.add_argument("--out", type=Path, required=True, help="the .csv file; the page lies beside it as .md")
    options = parser.parse_args()
    wanted = [n for n in NETWORKS if any(fnmatch.fnmatchcase(n.name, pattern) for pattern in options.networks)]
    if not wanted:
        raise SystemExit(f"no network is called {' or '.join(options.networks)}")
    for network in wanted:
        if not network.is_installed():
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of others' networks
                row = measure(network)
        except Exception as error:
            row = _refused(network, error)
        print(row, flush=True)
        known = {old["network"]: old for old in read_csv(options.out)[1]}
        known[row.network] = {name: str(value) for name, value in asdict(row).items()}
        order = {one.name: index for index, one in enumerate(NETWORKS)}
        rows = sorted(known.values(), key=lambda one: order.get(one["network"], len(order)))
        write_whole(options.out, csv_text(_COLUMNS, rows))
        write_whole(options.out.with_suffix(".md"), render_page(rows))


if __name__ == "__main__":
    main()
