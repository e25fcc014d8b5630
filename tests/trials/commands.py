"""Odd command lines: exit code 0, or 2 with a sentence, and 1 only with a place where the traceback is."""

import io
import itertools
import os
import re
import shutil
import sys

from tests.trials.child import run_in_child

ODD = (
    "", "0", "-1", "1.5", "nan", "inf", "1e300", "99999999999999999999", "none", "ä🙂", "a b", "--", "/", "/dev/null",
    "\n",
)  # fmt: skip
MODELS = (
    "", "nf_resnet27", "timm:", "timm:resnet19", "torchvision:", "torchvision:nothing", "nowhere:make", "os:getcwd",
    "os:path", "os:nothing", "sys:exit", "mine:raises", "mine:exits", "mine:loops", "mine:wrong", "mine:broken",
    "hub:", ":", "a:b:c", ".", "..", "/", "empty", "file", "net", "Torchvision:resnet18", "torch.nn:Linear",
)  # fmt: skip
MINE = """
import torch
from torch import nn

def raises(): raise KeyError("width")
def exits(): raise SystemExit(3)
def loops(): return loops()
def wrong(): return 3

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x): return self.conv(x)[1:, 999]

def broken(): return Broken()
def small(num_classes=4, in_channels=3):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)
"""
# A command line that works, and the options whose values are replaced.
OPTIONS = {
    ("spp", "mine:small", "--size", "16", "--batch", "2"): (
        "--size", "--batch", "--seeds", "--input", "--out", "--open", "--backward", "--nonsense",
    ),
    ("models", "nf_resnet26"): ("--size", "--json", "--nonsense"),
    ("convert", "mine:small", "--size", "16", "--batch", "2"): (
        "--size", "--batch", "--input", "--keep", "--alpha", "--exclude", "--depthwise", "--seed", "--out", "--report",
    ),
    ("export", "mine:small", "--size", "16", "--to", "pt2", "--out", "x.pt2"): ("--size", "--to", "--out"),
    ("bench", "--model", "mine:small", "--peers", "mine:small", "--size", "16", "--rounds", "1", "--processes", "1"): (
        "--batch", "--size", "--rounds", "--processes", "--threads", "--allocator", "--out", "--accumulate",
    ),
    ("train", "digits", "--model", "mine:small", "--model-args", "--train-images", "16", "--epochs", "1", "--quiet"): (
        "--lr", "--epochs", "--batch", "--image-size", "--test-size", "--train-images", "--data", "--model",
        "--model-args", "--optimizer", "--mixup", "--cutmix", "--ema", "--clip-norm", "--clip-adaptive", "--precision",
        "--workers", "--seed", "--out", "--resume", "--initial", "--auto-augment", "--warmup-epochs", "--log",
        "--weight-decay", "--label-smoothing", "--crop-scale", "--cut", "--signal-every", "--convert-args",
    ),
    ("eval", "run"): ("--data", "--weights", "--trusted-model"),
    ("study", "depth", "--data", "digits", "--budget", "toy", "--seeds", "1"): (
        "--data", "--seeds", "--only", "--budget",
    ),
}  # fmt: skip
FIXED = (
    (), ("--help",), ("-h",), ("--version",), ("nothing",), ("--nothing",), ("train",), ("train", "--list"),
    ("train", "nothing"), ("train", "--from"), ("train", "--from", "nowhere"), ("train", "--from", "file"),
    ("train", "--help"), ("eval",), ("eval", "nowhere"), ("eval", "empty"), ("eval", "file"), ("study",),
    ("study", "nothing"), ("export",), ("convert",), ("spp",), ("models", "nothing"), ("models", "["),
    ("bench", "nothing"), ("demo", "--depth", "51"), ("demo", "--epochs", "0"), ("demo", "--out", "file"),
    ("demo", "--batch", "-1"),
)  # fmt: skip
_ENDLESS = {(option, "99999999999999999999") for option in ("--seeds", "--rounds", "--processes")}  # and right


def command_lines():
    """Yield every command line of the trial."""
    yield from FIXED
    for command, model in itertools.product(("spp", "convert", "export"), MODELS):
        yield command, model, "--size", "16", *(("--to", "pt2") if command == "export" else ("--batch", "2"))
    for line, options in OPTIONS.items():
        for option, value in itertools.product(options, ODD):
            if (option, value) not in _ENDLESS:
                yield *line, option, value


def try_commands(random, count, scratch, advance=lambda words: None):
    """Run command lines that are drawn, in a folder of files; yield (command, verdict, words); "" for a fault."""
    import normfree

    (scratch / "mine.py").write_text(MINE)
    (scratch / "file").write_text("words")
    (scratch / "empty").mkdir()
    normfree.create_model("nf_resnet26", width=0.0625, num_classes=4).save_pretrained(scratch / "net")
    lines = list(command_lines())
    for number, line in enumerate(random.sample(lines, min(count, len(lines)))):
        folder = scratch / f"in{number}"
        shutil.copytree(scratch, folder, ignore=lambda _, names: [n for n in names if n.startswith("in")])
        outcome = run_in_child(lambda line=line, folder=folder: _run(line, folder), limit=180)
        shutil.rmtree(folder)
        yield line[0] if line else "", *_judge(outcome, " ".join(map(repr, line)))
        advance(" ".join(line[:1]))


def _run(line, folder):
    """Return exit code, standard output and standard error."""
    from normfree.cli import main

    os.chdir(folder)
    sys.argv = ["normfree", *line]
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return code, sys.stdout.getvalue(), sys.stderr.getvalue()


def _judge(outcome, line):
    if outcome.end != "returned":
        return "", f"{line}: {outcome.end} {outcome.words}"
    code, out, err = outcome.value
    sentence = re.search(r"^normfree: (.+)$", err, re.MULTILINE)
    if "Traceback (most recent" in out + err:
        return "", f"{line}: a traceback: {err[-300:]}"
    if code == 0:
        return "done", line
    if code == 2 and (sentence or "For full helptext" in out + err):  # the sentence is tyro's
        return "one sentence, exit code 2", f"{line}: {sentence[1] if sentence else ''}"
    return "", f"{line}: exit code {code}: {(out + err)[-300:]}"
