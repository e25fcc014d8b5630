"""Wrong arguments: ValueError, TypeError, or an error that the function documents; and the model is as it was."""

import dataclasses
import functools
import inspect
import os
from pathlib import Path

import torch
from torch import nn

import normfree
from normfree.models.registry import model_config
from normfree.nn import (
    EfficientChannelAttention,
    ScaledWSConv1d,
    ScaledWSConv2d,
    ScaledWSConv3d,
    ScaledWSLinear,
    SqueezeExcite,
    VarianceLedger,
    standardize,
)
from normfree.signal.monitor import SignalMonitor
from normfree.training import Recipe, evaluate_run, load_run, recipe, train
from normfree.training.data import load
from tests.trials.child import run_in_child, summary_of

DOCUMENTED = ("ValueError", "TypeError", "OSError", "ImportError", "SignalError", "TrainingError")


class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("of a stranger's")


class Strange:
    """Equal to nothing, of no length, and without a name."""

    def __repr__(self):
        return "<strange>"


def odd_values():
    return {
        "None": None, "True": True, "-1": -1, "0": 0, "1.5": 1.5, "nan": float("nan"), "inf": float("inf"),
        "1e300": 1e300, "10**30": 10**30, "''": "", "'no such'": "no such", "b''": b"x", "[]": [], "()": (), "{}": {},
        "strange": Strange(), "function": lambda: None, "class": Strange, "tensor": torch.ones(2),
        "nan tensor": torch.full((2, 3, 16, 16), float("nan")), "empty tensor": torch.empty(0, 3, 16, 16),
        "integers": torch.zeros(2, 3, 16, 16, dtype=torch.long), "linear": nn.Linear(2, 2), "raises": Raises(),
        "empty model": nn.Sequential(), "path": Path("/nowhere/at/all"), "folder": Path("/tmp"), "texts": ["a", "b"],
        "dict": {"a": 1}, "negative": (-1, -1), "report": "x.pdf",
    }  # fmt: skip


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TINY = Recipe(
    model="tests.trials.files:with_batch_norm", data="digits", image_size=16, epochs=1, train_images=16, workers=0
)


def _measured():
    return normfree.characterize(model(), X)


def _monitor(model, every, path, step):
    with SignalMonitor(model, every=every, path=path, step=step):
        model.train()(X)


def calls():
    """Yield functions and arguments that they accept: (name, function, arguments)."""
    small = {"name": "nf_resnet26", "width": 0.0625, "num_classes": 4}
    for variant in ("nf_resnet26", "nf_regnet_b0", "nfnet_f0", "bn_resnet26", "fixup_resnet26"):
        fields = {f.name: getattr(model_config(variant), f.name) for f in dataclasses.fields(model_config(variant))}
        fields |= {"width": 0.25} if "resnet" in variant else {}
        yield "create_model", normfree.create_model, {"name": variant, **fields}
    yield "create_model", normfree.create_model, small | {"device": "cpu", "dtype": torch.float32}
    yield "list_models", normfree.list_models, {"pattern": "*"}
    yield "from_pretrained", normfree.from_pretrained, {"source": "/nowhere"}
    yield "from_timm", normfree.from_timm, {"model": None}
    yield "load_haiku", normfree.load_haiku, {"model": normfree.create_model(**small), "params": {}, "state": None}
    yield "characterize", normfree.characterize, {
        "model": model(), "inputs": X, "seeds": 1, "open_branches": True, "batch_stats": True, "backward": False,
        "name": "x",
    }  # fmt: skip
    yield (
        "convert",
        normfree.convert,
        {"model": model(), "images": X, "keep": "weights", "alpha": 0.2, "exclude": (), "depthwise": "standardize"},
    )
    yield "load_converted", normfree.load_converted, {"model": model(), "path": "/nowhere"}
    yield "export", normfree.export, {"model": model(), "path": "x.pt2", "to": "pt2", "size": 16}
    yield "fold", normfree.fold, {"model": model(), "inplace": False}
    yield "compare", normfree.compare, {"reports": [_measured()], "title": "x", "below": ()}
    yield "report.save", _measured().save, {"path": "x.csv"}
    yield "report.check", _measured().check, _defaults(_measured().check)
    yield "param_groups", normfree.param_groups, {"model": model(), "weight_decay": 0.1}
    yield "gain", normfree.gain, {"activation": "relu", "source": "exact"}
    yield "standardize", standardize, {"weight": torch.randn(4, 3, 3, 3), "scale": torch.ones(4), "eps": 1e-4}
    for layer in (ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d):
        yield layer.__name__, layer, {"in_channels": 4, "out_channels": 4, "kernel_size": 3} | _defaults(layer)
    yield "ScaledWSLinear", ScaledWSLinear, {"in_features": 4, "out_features": 4} | _defaults(ScaledWSLinear)
    yield "SqueezeExcite", SqueezeExcite, {"channels": 8, "hidden": 2} | _defaults(SqueezeExcite)
    yield (
        "EfficientChannelAttention",
        EfficientChannelAttention,
        {"kernel_size": 3} | _defaults(EfficientChannelAttention),
    )
    yield "VarianceLedger", VarianceLedger, {"alpha": 0.2}
    yield "SignalMonitor", _monitor, {"model": model(), "every": 1, "path": "signal.csv", "step": 0}
    yield "Recipe", Recipe, dataclasses.asdict(TINY)
    yield "recipe", recipe, {"name": "digits"}
    yield "train", train, {"recipe": TINY, "out": "run", "resume": "never", "quiet": True, "data": None}
    yield "load_run", load_run, {"run": "/nowhere", "weights": None, "trusted_model": None}
    yield "evaluate_run", evaluate_run, {"run": "/nowhere", "data": None, "weights": None, "trusted_model": None}
    yield "load", load, {"spec": "digits"}


def _defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def misuses():
    """Yield every call of the trial: (name, function, arguments, argument, name of its value)."""
    for name, function, arguments in calls():
        for argument in sorted(arguments.keys() - {"device"}):  # which torch refuses in its own way
            for odd in odd_values():
                yield name, function, arguments, argument, odd


def try_calls(random, count, scratch, advance=lambda words: None):
    """Call with wrong arguments that are drawn; yield (function, verdict, words), the verdict "" for a fault."""
    every = list(misuses())
    for name, function, arguments, argument, odd in random.sample(every, min(count, len(every))):
        call = functools.partial(_call, function, arguments, argument, odd, scratch)
        outcome = run_in_child(call, limit=120)
        yield name, *_judge(outcome, f"{name}({argument}={odd})")
        advance(name)


def _call(function, arguments, argument, odd, scratch):
    """Return whether the models among the arguments are as they were, and what was raised."""
    folder = scratch / str(os.getpid())
    folder.mkdir()
    os.chdir(folder)
    given = arguments | {argument: odd_values()[odd]}
    models = [value for value in given.values() if isinstance(value, nn.Module)]
    before = [_state(one) for one in models]
    random_state = torch.get_rng_state()
    error = None
    try:
        function(**given)
    except Exception as raised:
        error = raised
    trains = function in (train, _monitor, normfree.load_haiku, normfree.load_converted)
    if error is None and trains:
        return "done", True
    same = before == [_state(one) for one in models]
    if error is not None and function in (normfree.characterize, normfree.convert, normfree.fold, normfree.export):
        same = same and torch.equal(random_state, torch.get_rng_state())
    if error is not None:
        raise error if same else AssertionError(f"the model, or the random state, is not as it was after {error!r}")
    return "done", same


def _state(model):
    modes = [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
    return modes, summary_of(model.state_dict()), [p.requires_grad for p in model.parameters()]


def _judge(outcome, call):
    if outcome.end == "returned":
        return ("accepted" if outcome.value[1] else ""), f"{call}: changed its model"
    if outcome.is_a(*DOCUMENTED):
        return "a documented error", f"{call}: {outcome.words}"
    return "", f"{call}: {outcome.end} {outcome.words[:300]}"
