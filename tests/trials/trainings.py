"""Trainings that are killed, which end bit for bit as the one that was left alone, and trainings of two processes."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time

from normfree.training import RECIPES, train
from tests.trials.child import run_in_child

RECIPE = dataclasses.replace(
    RECIPES["digits"], model_args=("width=0.0625",), epochs=2, batch=16, train_images=96, checkpoint_every=2, ema=0.9,
    signal_every=4,
)  # fmt: skip
_ENDS = ("model.safetensors", "model_ema.safetensors", "config.json", "signal.csv")


def try_kills(random, count, scratch, advance=lambda words: None):
    """Kill trainings at moments that are drawn, `count` times; yield (kind, verdict, words), "" for a fault."""
    whole = scratch / "whole"
    start = time.monotonic()
    outcome = run_in_child(lambda: bool(train(RECIPE, whole, quiet=True)))
    assert outcome.end == "returned", outcome.words
    seconds, expected = time.monotonic() - start, _end_of(whole)
    killed = number = 0
    while killed < count:
        number += 1
        out = scratch / f"run{number}"
        times = 0
        while True:
            limit = random.uniform(0, 1.2 * seconds) if killed < count else 120.0
            outcome = run_in_child(lambda out=out: bool(train(RECIPE, out, resume="auto", quiet=True)), limit=limit)
            if outcome.end != "hung":
                break
            killed, times = killed + 1, times + 1
        words = f"killed {times} times"
        if outcome.end != "returned":
            verdicts = [("", f"{words}: {outcome.end} {outcome.words[:300]}")]
        elif (end := _end_of(out)) != expected:
            verdicts = [("", f"{words}: other {', '.join(name for name in end if end[name] != expected[name])}")]
        else:
            verdicts = [("ended bit for bit", words)] * max(times, 1)
        for verdict, said in verdicts:
            yield "kill -9", verdict, said
        advance(words)


def _end_of(out):
    """Return what a run leaves, but for what tells the time."""
    found = {name: (out / name).read_bytes() for name in _ENDS}
    rows = csv.DictReader((out / "metrics.csv").read_text().splitlines())
    return found | {"metrics.csv": [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]}


def try_processes(random, count, scratch, advance=lambda words: None):
    """Launch two processes with workers, `count` times; yield (kind, verdict, words), "" for a fault."""
    recipe = dataclasses.replace(RECIPE, workers=2, checkpoint_every=0, signal_every=0, epochs=1)
    (scratch / "recipe.json").write_text(recipe.to_json())
    for number in range(count):
        out = scratch / f"two{number}"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "normfree",
            "train", "--from", str(scratch / "recipe.json"), "--out", str(out), "--quiet",
        ]  # fmt: skip
        launched = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        try:
            _, errors = launched.communicate(timeout=180)
            good = launched.returncode == 0 and (out / "model.safetensors").exists()
            said = f"exit code {launched.returncode} {errors.decode()[-300:] if not good else ''}"
            yield "two processes", "ended well" if good else "", said
        except subprocess.TimeoutExpired:
            os.killpg(launched.pid, signal.SIGKILL)
            yield "two processes", "", "hung for 180 s"
        advance(f"launch {number + 1}")
