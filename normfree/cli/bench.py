"""`normfree bench`: our networks beside what people would use instead, on this machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from normfree.benchmarks.inference import PEERS as INFERENCE_PEERS
from normfree.benchmarks.inference import inference
from normfree.benchmarks.measure import ALLOCATORS, Setting, machine
from normfree.benchmarks.peers import NETWORKS
from normfree.benchmarks.train_step import PEERS as TRAINING_PEERS
from normfree.benchmarks.train_step import train_step
from normfree.cli.output import announce, check_writable, show_table
from normfree.errors import suggest


def bench(
    what: Annotated[Literal["train-step", "inference"], tyro.conf.Positional] = "train-step",
    /,
    *,
    model: str = "nf_resnet50",
    peers: tuple[str, ...] = (),
    batch: int = 16,
    size: int = 224,
    peer_size: int | None = None,
    channels_last: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    allocator: Literal["default", "tuned"] = "default",
    threads: int = 2,
    rounds: int = 9,
    processes: int = 3,
    out: Path | None = None,
) -> None:
    """Measure time (and, in training, what is kept for the backward pass) as ratios to other networks, interleaved.

    Below 1 ours is ahead. Close other programs first: rounds are repeated until the ratios are steady.

    Args:
        what: A training step (forward and backward) or inference with folded weights.
        model: The network whose ratios are given.
        peers: Networks to compare with; by default those that a user would pick instead.
        batch: Number of images.
        size: Image size in pixels.
        peer_size: That of the peers, where it is another one.
        channels_last: Memory layout.
        allocator: "tuned" makes glibc keep what is freed, which takes page faults out of the comparison.
        threads: Number of threads of PyTorch.
        rounds: At least so many in each process; more while the ratios scatter.
        processes: How many, one after the other; a ratio also depends on where a process's memory comes to lie.
        out: JSON file for the numbers, the machine and the versions.
    """
    training = what == "train-step"
    peers = peers or (TRAINING_PEERS if training else INFERENCE_PEERS)
    for name in (model, *peers):
        if name not in NETWORKS:
            raise ValueError(f"no benchmark network is called {name!r}{suggest(name, NETWORKS)}")
    if min(batch, size, peer_size or size, threads, processes) < 1 or rounds < 2:
        raise ValueError("batch, size, threads and processes must be at least 1, rounds at least 2")
    if out is not None:
        check_writable(out, [".json"])
    setting = Setting(model, peers, batch, size, peer_size, channels_last, allocator, threads, rounds, processes)
    where = machine()
    print(f"{where['processor']}, {threads} threads, load {where['load']}, {where['versions']}")
    print(f"{what} of {model}, batch {batch}, {size} pixels, {allocator} allocator ({ALLOCATORS[allocator] or 'none'})")
    rows = (train_step if training else inference)(setting)
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
    if out is not None:
        out.write_text(
            json.dumps({"machine": where, "what": what, "setting": asdict(setting), "rows": rows}, indent=2) + "\n"
        )
        announce([out])
