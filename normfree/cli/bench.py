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
from normfree.benchmarks.memory import PEERS as MEMORY_PEERS
from normfree.benchmarks.memory import memory
from normfree.benchmarks.train_step import PEERS as TRAINING_PEERS
from normfree.benchmarks.train_step import train_step
from normfree.cli.arguments import Size, height_and_width
from normfree.cli.output import Json, announce, check_writable, progress, show_json, show_table
from normfree.files.whole import write_whole
from normfree.sources import model_factory

MEASUREMENTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "train-step": train_step,
    "memory": memory,
    "inference": inference,
}
PEERS = {"train-step": TRAINING_PEERS, "memory": MEMORY_PEERS, "inference": INFERENCE_PEERS}


def bench(
    what: Annotated[Literal["train-step", "memory", "inference"], tyro.conf.Positional] = "train-step",
    /,
    *,
    model: str = "nf_resnet50",
    convert: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    peers: tuple[str, ...] = (),
    batch: int = 16,
    size: Size = (224,),
    peer_size: Size = (),
    channels_last: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    accumulate: int = 1,
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    recompute_weights: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    allocator: Literal["default", "tuned"] = "default",
    threads: int = 2,
    rounds: int = 9,
    processes: int = 3,
    out: Path | None = None,
    json_output: Json = False,
) -> None:
    """Measure time or memory as ratios to other networks: below 1 ours is ahead. Rounds go on until they are steady.

    Args:
        what: The time of a training step (forward, backward, SGD with momentum), the peak memory of one, or the time of
            inference with folded weights.
        model: The network whose ratios are given: nf_resnet50, timm:NAME, torchvision:NAME, package.module:factory.
        convert: Convert it first.
        peers: Networks to compare with, named likewise; by default plain convolutions and what people take instead.
        batch: Number of images.
        size: Height and width of the images, or one number for both.
        peer_size: That of the peers, where it is another one.
        channels_last: Memory layout.
        accumulate: Batches per update; our weights are computed once for all (`normfree.nn.shared_weights`).
        compile: Compile all networks (torch.compile).
        recompute_weights: Keep no effective weight of ours for the backward pass (`normfree.nn.recompute_weights`).
        allocator: "tuned" makes glibc keep what is freed, which takes page faults out of times.
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
        model, peers, convert, batch, (height, width), height_and_width(peer_size), channels_last,
        "returning" if what == "memory" else allocator, threads, accumulate, compile, recompute_weights, rounds,
        processes,
    )  # fmt: skip
    document = {"machine": machine(), "what": what, "setting": asdict(setting), "rows": _measure(what, setting)}
    _save_and_show(document, setting, out, json_output)


def _save_and_show(document: dict[str, Any], setting: Setting, out: Path | None, json_output: bool) -> None:
    if out is not None:
        write_whole(out, json.dumps(document, indent=2) + "\n")
    if json_output:
        show_json(document)
    else:
        _show(document["what"], setting, document["rows"])
        announce([out] if out else [])


def _measure(what: str, setting: Setting) -> list[dict[str, Any]]:
    processes = setting.processes * (1 + len(setting.peers) if what == "memory" else 1)
    with progress() as bar:
        task = bar.add_task(what, total=processes)
        return MEASUREMENTS[what](setting, lambda: bar.advance(task))


def _show(what: str, setting: Setting, rows: list[dict[str, Any]]) -> None:
    where, allocator = machine(), setting.allocator
    size = "×".join(map(str, setting.size))
    print(f"{where['processor']}, {setting.threads} threads, load {where['load']}, {where['versions']}")
    print(
        f"{what} of {setting.ours}, batch {setting.batch}, {size} pixels, {allocator} allocator "
        f"({ALLOCATORS[allocator] or 'none'})"
    )
    if what == "memory":
        show_table(("to", "peak memory", "MiB", "the other's"), [_memory_row(row) for row in rows])
        return
    training = what == "train-step"
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


def _memory_row(row: dict[str, Any]) -> tuple[str, ...]:
    return row["peer"], f"{row['ratio']:.3f}", f"{row['ours_bytes'] / 2**20:.0f}", f"{row['peer_bytes'] / 2**20:.0f}"
