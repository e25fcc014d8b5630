"""`normfree bench`: our networks beside what people would use instead, on this machine."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from normfree.benchmarks.inference import PEERS as INFERENCE_PEERS
from normfree.benchmarks.inference import inference
from normfree.benchmarks.measure import ALLOCATORS, Setting, machine
from normfree.benchmarks.train_step import PEERS as TRAINING_PEERS
from normfree.benchmarks.train_step import train_step
from normfree.cli.arguments import Size, height_and_width
from normfree.cli.output import Json, announce, check_writable, progress, show_json, show_table
from normfree.files import replacing
from normfree.sources import model_factory

MEASUREMENTS: dict[str, Callable[..., list[dict[str, Any]]]] = {"train-step": train_step, "inference": inference}
PEERS = {"train-step": TRAINING_PEERS, "inference": INFERENCE_PEERS}


def bench(
    what: Annotated[Literal["train-step", "inference"], tyro.conf.Positional] = "train-step",
    /,
    *,
    model: str = "nf_resnet50",
    convert: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    peers: tuple[str, ...] = (),
    batch: int = 16,
    size: Size = (224,),
    peer_size: Size = (),
    channels_last: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    allocator: Literal["default", "tuned"] = "default",
    threads: int = 2,
    rounds: int = 9,
    processes: int = 3,
    out: Path | None = None,
    json_output: Json = False,
) -> None:
    """Measure time (and, in training, what is kept for the backward pass) as ratios to other networks, interleaved.

    Below 1 ours is ahead. Rounds are repeated until the ratios are steady.

    Args:
        what: A training step (forward and backward) or inference with folded weights.
        model: The network whose ratios are given: nf_resnet50, timm:NAME, torchvision:NAME, package.module:factory.
        convert: Convert it first.
        peers: Networks to compare with, named likewise; by default the limit, and what a user would pick instead.
        batch: Number of images.
        size: Height and width of the images, or one number for both.
        peer_size: That of the peers, where it is another one.
        channels_last: Memory layout.
        allocator: "tuned" makes glibc keep what is freed, which takes page faults out of the comparison.
        threads: Number of threads of PyTorch.
        rounds: At least so many in each process, and up to 15 while the ratios scatter.
        processes: How many, one after the other: where a process's memory comes to lie moves a ratio too.
        out: JSON file for the numbers, the machine and the versions.
        json_output: Print those as JSON instead of a table.
    """
    peers = peers or PEERS[what]
    for name in (model, *peers):
        model_factory(name)  # raises ValueError
    if out is not None:
        check_writable(out, [".json"])
    height, width = height_and_width(size) or (224, 224)
    setting = Setting(
        model, peers, convert, batch, (height, width), height_and_width(peer_size), channels_last, allocator, threads,
        rounds, processes,
    )  # fmt: skip
    with progress() as bar:
        task = bar.add_task(what, total=processes)
        rows = MEASUREMENTS[what](setting, lambda: bar.advance(task))
    document = {"machine": machine(), "what": what, "setting": asdict(setting), "rows": rows}
    if out:
        with replacing(out) as path:
            path.write_text(json.dumps(document, indent=2) + "\n")
    if json_output:
        show_json(document)
        return
    _show(what, setting, rows)
    announce([out] if out else [])


def _show(what: str, setting: Setting, rows: list[dict[str, Any]]) -> None:
    training = what == "train-step"
    where, allocator = machine(), setting.allocator
    size = "×".join(map(str, setting.size))
    print(f"{where['processor']}, {setting.threads} threads, load {where['load']}, {where['versions']}")
    print(
        f"{what} of {setting.ours}, batch {setting.batch}, {size} pixels, {allocator} allocator "
        f"({ALLOCATORS[allocator] or 'none'})"
    )
    columns = ("to", "time", "quartiles", "rounds", "kept for backward")
    show_table(
        columns if training else columns[:-1],
        [
            (
                row["peer"], f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", str(row["rounds"]),
                *([f"{row['kept_ratio']:.3f}"] if training else []),
            )
            for row in rows
        ],
    )  # fmt: skip
