"""The conversion: somebody's network with normalizers -> the same network without."""

import contextlib
import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from normfree.arguments import checked
from normfree.conversion.calibration import CLOSE, calibrate
from normfree.conversion.comparison import observe, refuse_difference
from normfree.conversion.decision import affine_norms, kept_norms, list_changes, make_plan
from normfree.conversion.plan import Change, Plan
from normfree.conversion.replacement import apply_plan
from normfree.conversion.saving import save
from normfree.conversion.structure import norm_paths, read_structure
from normfree.errors import SignalError
from normfree.nn.surgery import copied, refuse_sharded
from normfree.signal import SignalReport, characterize
from normfree.signal.measurement import characterize_on_tape
from normfree.trace.inputs import as_call, examples
from normfree.trace.joins import find_joins
from normfree.trace.preparation import closed_multipliers, closed_parameters, is_quantized, opened_branches
from normfree.trace.progress import telling
from normfree.trace.tape import Tape
from normfree.trace.watched import exclusively, refuse_unrunnable, run_watched

Norm = Literal["batch", "group", "layer", "instance"]

_NORMS: dict[str, tuple[tuple[type[nn.Module], ...], frozenset[str]]] = {
    "batch": ((nn.modules.batchnorm._BatchNorm,), frozenset({"FrozenBatchNorm"})),
    "group": ((nn.GroupNorm,), frozenset()),
    "layer": ((nn.LayerNorm,), frozenset({"LayerNorm2d"})),
    "instance": ((nn.modules.instancenorm._InstanceNorm,), frozenset()),
}
_ENOUGH = 64


@dataclass(frozen=True)
class Conversion:
    """Converted network, and what was changed on the way.

    Attributes:
        model: The network without normalizers.
        changes: One `Change` per replaced layer and per normalizer.
        before: Signal of the original.
        after: Signal of the converted network.
        departure: Largest departure after calibration, of a branch's variance where it joins, or of a layer's that runs
            several times, from what it should be, over that.
        plan: Modules that were replaced, by path.
        difference: With `keep="function"` the largest difference of an output from the original's in eval mode, over
            its largest value; else None.
    """

    model: nn.Module
    changes: tuple[Change, ...]
    before: SignalReport
    after: SignalReport
    departure: float
    plan: Plan
    difference: float | None = None

    @property
    def kept(self) -> list[Change]:
        """Normalizers that are still there, and why."""
        return [change for change in self.changes if change.action == "kept"]

    def __str__(self) -> str:
        counts = {action: sum(c.action == action for c in self.changes) for action in ("replaced", "removed", "kept")}
        lines = [
            f"{counts['replaced']} layers replaced, {counts['removed']} normalizers removed, {counts['kept']} kept",
            *([f"variances are up to {self.departure:.0%} off what they should be"] if self.departure > CLOSE else []),
            *([f"outputs differ by {self.difference:.1e} of the largest"] if self.difference is not None else []),
            *(f"{c.action:<9}{c.path}  {c.layer}{'  ' + c.note if c.note else ''}" for c in self.changes),
            "",
            "before:",
            str(self.before),
            "after:",
            str(self.after),
        ]
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write tensors, scales included, and the plan that `load_converted` follows, as one .safetensors file.

        Raises ValueError for another suffix, OSError where it cannot be written.
        """
        return save(self.model, self.plan, Path(path))


@exclusively
@torch.inference_mode(mode=False)
@checked
def convert(
    model: nn.Module,
    images: Any,
    *,
    keep: Literal["weights", "function"] = "weights",
    alpha: float | None = None,
    norms: Sequence[Norm] = ("batch",),
    exclude: Sequence[str] = (),
    depthwise: Literal["standardize", "scale"] = "standardize",
    inplace: bool = False,
) -> Conversion:
    """Make a network without its normalizers, its signal under control, and say what was changed to get there.

    Every convolution that a normalizer normalizes, directly or on the way to the next pre-activation, becomes a
    `ScaledWSConv` with the same weights; the normalizer becomes the identity, keeping an activation and a dropout that
    it carries; its scale and shift become gain and bias where it took a convolution's output as it was. The last
    convolution of each residual branch gets α and a SkipInit gain (1, or 0 where the normalizer's weight was 0). Then
    every layer's `in_scale` is set so that on the images its output has the variance that the normalizer would have
    given it, at the end of a branch where it joins, and its bias so that its channels have those means. Modules are
    replaced, no forward is touched. The weights are preserved, up to a factor per layer that standardization ignores;
    the function is not, unless it is asked for.

    Args:
        model: Network to convert.
        images: A batch, as for `characterize`, or a DataLoader, of which the first 64 images are taken.
        keep: "weights", or "function", for a trained network that is to be trained on at a low rate: α is 1, filters
            are scaled without subtracting their means, such that the network computes what the original does in eval
            mode; a normalizer of anything but one layer's output becomes a `ChannelAffine`, one without running
            statistics stays.
        alpha: Factor of branches of unit variance; None: 0.2.
        norms: Normalizers that go: "batch" (frozen and synchronized ones too), "group", "layer", "instance".
        exclude: Paths of modules that stay as they are, with everything in them; glob patterns too.
        depthwise: Treatment of convolutions with one channel per group: "standardize", or "scale", without subtracting
            the mean.
        inplace: Convert the model itself rather than a copy; a SignalError may leave it half converted.

    Returns:
        The converted network, every change with its reason, and the signal before and after.

    Raises:
        ValueError: Where nothing can be converted, or an argument cannot be.
        TypeError: For a model that is no module, or cannot be copied.
        SignalError: Where the model does not run on the images, a variance cannot be set, or with `keep="function"`
            an output differs by more than rounding.
    """
    _check(model, keep, alpha, norms, exclude, depthwise)
    paths = _selected(model, norms, exclude)
    images = examples(images, model, _ENOUGH) if isinstance(images, DataLoader) else images
    model = model if inplace else copied(model)
    with telling(f"converting {type(model).__name__}"):
        before, tape = characterize_on_tape(model, images)
        call = as_call(images, model)
        exactly = keep == "function"
        plan, changes = _decide(model, tape, paths, exclude, exactly=exactly, scale_depthwise=depthwise == "scale")
        original = observe(model, call, plan) if exactly else None
        departure = _apply_and_calibrate(plan, model, tape, call, exactly, 0.2 if alpha is None else alpha)
        with _all_running(model, plan):
            after = characterize(model, images)
        difference = None if original is None else refuse_difference(original, model, call, plan)
    return Conversion(model, changes, before, after, departure, plan, difference)


def _decide(
    model: nn.Module, tape: Tape, paths: set[str], exclude: Sequence[str], *, exactly: bool, scale_depthwise: bool
) -> tuple[Plan, tuple[Change, ...]]:
    structure = read_structure(tape, paths)
    kept = kept_norms(model, structure, paths, exclude, exactly=exactly)
    removed = [path for path in sorted(paths) if path not in kept]
    if not removed:
        raise _nothing_to_convert(model, "; ".join(f"{path}: {reason}" for path, reason in list(kept.items())[:3]))
    affine = affine_norms(model, structure, removed, exclude) if exactly else {}
    plan = make_plan(model, structure, removed, affine, exactly=exactly, scale_depthwise=scale_depthwise)
    return plan, list_changes(model, plan, kept, affine)


def _apply_and_calibrate(
    plan: Plan, model: nn.Module, tape: Tape, call: tuple[tuple[Any, ...], dict[str, Any]], exactly: bool, alpha: float
) -> float:
    """Apply the plan, and unless `exactly` set all scales; return the largest departure of a branch's variance."""
    if exactly:
        apply_plan(plan, model, keep_function=True)
        return 0.0
    multipliers = {name for join in find_joins(tape) for name in join.parameters}
    layers = apply_plan(plan, model)
    for planned in plan.layers:
        layers[planned.path].out_scale.fill_(alpha if planned.skip_gain else 1)
    after_norms = [planned.path for planned in plan.layers if planned.norm is not None]
    shifts = {path: bias.detach().clone() for path in after_norms if (bias := layers[path].bias) is not None}
    with opened_branches(model, closed_parameters(model) + closed_multipliers(model, multipliers)):
        return calibrate(layers, shifts, lambda tape: run_watched(model, tape, *call))


def _check(
    model: Any, keep: str, alpha: float | None, norms: Sequence[str], exclude: Sequence[str], depthwise: str
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    if isinstance(norms, str) or not norms or not set(norms) <= set(_NORMS):
        raise ValueError(f"norms is {norms!r}; it must be a sequence of {', '.join(_NORMS)}")
    if isinstance(exclude, str):
        raise ValueError(f"exclude is {exclude!r}; it must be a sequence of paths or patterns: [{exclude!r}]")
    if depthwise not in ("standardize", "scale"):
        raise ValueError(f"depthwise is {depthwise!r}; it must be 'standardize' or 'scale'")
    if keep not in ("weights", "function"):
        raise ValueError(f"keep is {keep!r}; it must be 'weights' or 'function'")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; it must be positive")
    if alpha is not None and keep == "function":
        raise ValueError(f"alpha is {alpha}; where the function is kept, branches are not scaled")
    refuse_unrunnable(model)
    refuse_sharded(model)


def _selected(model: nn.Module, norms: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Find the paths of the normalizers to remove. Raises ValueError for none, and for an `exclude` without a match."""
    known = dict(model.named_modules())
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in known):
            raise ValueError(f"exclude has {pattern!r}, which is no module of {type(model).__name__}")
    found = set().union(*(norm_paths(model, *_NORMS[norm]) for norm in norms))
    if "" in found:
        raise ValueError("the model is a normalizer itself")
    quantized = [path for path, module in known.items() if is_quantized(module)]
    if not found.difference(quantized):
        reasons = [] if found else ["it has no such normalizer"]
        reasons += [f"{path} is quantized: convert the network before that" for path in quantized[:1]]
        raise _nothing_to_convert(model, "; ".join(reasons))
    return found


def _nothing_to_convert(model: nn.Module, why: str) -> ValueError:
    return ValueError(f"nothing in {type(model).__name__} can be converted ({why})")


@contextlib.contextmanager
def _all_running(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Raise SignalError where a module that was put in did not run."""
    paths = [planned.path for planned in plan.layers] + [norm.path for norm in plan.removed]
    missing = dict.fromkeys(paths)
    with contextlib.ExitStack() as hooks:
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(lambda *_, path=path: missing.pop(path, None))
            hooks.callback(hook.remove)
        yield
    if missing:
        raise SignalError(
            f"{next(iter(missing))} was replaced and did not run: the forward reaches the one before past the modules' "
            "tree, as through a plain list (use nn.ModuleList)"
        )
