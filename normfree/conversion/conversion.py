"""convert(): somebody's network with normalizers -> the same network without."""

import contextlib
import copy
import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normfree.conversion.calibration import CLOSE, calibrate
from normfree.conversion.plan import Change, Plan, kept_norms, list_changes, make_plan
from normfree.conversion.structure import norm_paths, read_structure
from normfree.errors import SignalError
from normfree.signal import SignalReport, characterize
from normfree.signal.measurement import refuse_what_cannot_run
from normfree.trace.inputs import as_call, map_tensors, tensors
from normfree.trace.joins import find_joins
from normfree.trace.preparation import closed_multipliers, closed_parameters, is_quantized, measuring, opened
from normfree.trace.tape import Tape

Norm = Literal["batch", "group", "layer", "instance"]

_NORMS: dict[str, tuple[tuple[type[nn.Module], ...], frozenset[str]]] = {
    "batch": ((nn.modules.batchnorm._BatchNorm,), frozenset({"FrozenBatchNorm2d", "FrozenBatchNormAct2d"})),
    "group": ((nn.GroupNorm,), frozenset()),
    "layer": ((nn.LayerNorm,), frozenset({"LayerNorm2d"})),
    "instance": ((nn.modules.instancenorm._InstanceNorm,), frozenset()),
}
_ENOUGH = 64
_PLAN = "normfree_plan"


@dataclass(frozen=True)
class Conversion:
    """A converted network, and what was changed on the way."""

    model: nn.Module
    changes: tuple[Change, ...]
    before: SignalReport
    after: SignalReport
    departure: float  # largest |variance - 1| of a branch where it joins, after calibration
    plan: Plan

    @property
    def kept(self) -> list[Change]:
        """The normalizers that are still there, and why."""
        return [change for change in self.changes if change.action == "kept"]

    def __str__(self) -> str:
        counts = {action: sum(c.action == action for c in self.changes) for action in ("replaced", "removed", "kept")}
        lines = [
            f"{counts['replaced']} layers replaced, {counts['removed']} normalizers removed, {counts['kept']} kept",
            *([f"branches join up to {self.departure:.0%} off their variance"] if self.departure > CLOSE else []),
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
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"cannot write {path}: the suffix must be .safetensors")
        try:
            save_model(self.model, str(path), metadata={_PLAN: self.plan.to_json()})
        except Exception as error:  # safetensors has an error of its own
            raise OSError(f"cannot write {path}: {error}") from error
        return path


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
    """A network without its normalizers, its signal under control, and what was changed to get there.

    Every convolution that a normalizer normalizes, directly or on the way to the next pre-activation, becomes a
    `ScaledWSConv` with the same weights; the normalizer becomes the identity, keeping an activation and a dropout that
    it carries; its scale and shift become gain and bias where it took a convolution's output as it was. The last
    convolution of each residual branch gets α and a SkipInit gain (1, or 0 where the normalizer's weight was 0). Then
    every layer's `in_scale` is set so that on the images its output has the variance that the normalizer would have
    given it, at the end of a branch where it joins, and its bias so that its channels have those means. Modules are
    replaced, no forward is touched. The weights are preserved, up to a factor per layer that standardization ignores;
    the function is not, unless it is asked for.

    images     a batch, as for `characterize`, or a DataLoader, of which the first 64 images are taken
    keep       "weights", or "function", for a trained network that is to be trained on at a low rate: α is 1, filters
               are scaled without subtracting their means, such that the network computes what the original does in
               eval mode; normalizers without running statistics, or of anything but one layer's output, stay
    alpha      what branches of unit variance are multiplied by; None: 0.2
    norms      which normalizers go: "batch" (frozen and synchronized ones too), "group", "layer", "instance"
    exclude    paths of modules that stay as they are, with everything in them; glob patterns too
    depthwise  of convolutions with one channel per group: "standardize", or "scale", without subtracting the mean
    inplace    convert the model itself rather than a copy; a SignalError may leave it half converted

    Raises ValueError where nothing can be converted or an argument cannot be, TypeError for what is no module, and
    SignalError where the model does not run on the images or a variance cannot be set.
    """
    _check(model, keep, alpha, norms, exclude, depthwise)
    alpha = 0.2 if alpha is None else alpha
    paths = _selected(model, norms, exclude)
    images = _batch(images)
    refuse_what_cannot_run(model)
    model = model if inplace else copy.deepcopy(model)
    before = characterize(model, images)
    args, kwargs = as_call(images, model)
    tape = Tape()
    _run(model, tape, args, kwargs)
    structure = read_structure(tape, paths)
    kept = kept_norms(model, structure, paths, exclude, exactly=keep == "function")
    removed = [path for path in sorted(paths) if path not in kept]
    if not removed:
        raise _nothing_to_convert(model, "; ".join(f"{path}: {reason}" for path, reason in list(kept.items())[:3]))
    plan = make_plan(model, structure, removed, exactly=keep == "function", scale_depthwise=depthwise == "scale")
    changes = list_changes(model, plan, kept)
    if keep == "function":
        plan.apply(model, computing=True)
        with _all_running(model, plan):
            after = characterize(model, images)
        return Conversion(model, changes, before, after, 0.0, plan)
    multipliers = {name for join in find_joins(tape) for name in join.parameters}
    layers = plan.apply(model)
    for planned in plan.layers:
        layers[planned.path].out_scale.fill_(alpha if planned.skip_gain else 1)
    after_norms = [planned.path for planned in plan.layers if planned.norm is not None]
    shifts = {path: bias.detach().clone() for path in after_norms if (bias := layers[path].bias) is not None}
    with opened(model, closed_parameters(model) + closed_multipliers(model, multipliers)):
        departure = calibrate(layers, shifts, lambda tape: _run(model, tape, args, kwargs))
    with _all_running(model, plan):
        after = characterize(model, images)
    return Conversion(model, changes, before, after, departure, plan)


def load_converted(model: nn.Module, path: str | Path) -> nn.Module:
    """`model`, a fresh network of the class that was converted, as `Conversion.save` wrote it; changed in place.

    Raises ValueError for a file that is none of ours, or of another network.
    """
    try:
        with safe_open(str(path), "pt") as file:
            plan = Plan.from_json((file.metadata() or {}).get(_PLAN, ""))
            held = set(file.keys())
            for name, parameter in model.named_parameters():
                here = tuple(parameter.shape)
                if name in held and (there := tuple(file.get_slice(name).get_shape())) != here:
                    raise ValueError(f"{name} is {there} there and {here} here")
        plan.apply(model)
        load_model(model, str(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no conversion of a {type(model).__name__} ({error})") from error
    return model


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: gains, biases, skip gains and normalizers without weight decay."""
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


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


def _batch(images: Any) -> Any:
    """The inputs as `characterize` takes them; of a DataLoader the first 64 images."""
    if not isinstance(images, DataLoader):
        return images
    taken: list[Tensor] = []
    for batch in images:
        first = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(first, Tensor):
            return images
        if taken and first.shape[1:] != taken[0].shape[1:]:
            break
        taken.append(first)
        if sum(map(len, taken)) >= _ENOUGH:
            break
    return torch.cat(taken)[:_ENOUGH] if taken else images


def _selected(model: nn.Module, norms: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Paths of the normalizers to remove. Raises ValueError where none are, and for an `exclude` without a match."""
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
    """Raises SignalError where a module that was put in did not run."""
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


def _run(model: nn.Module, tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One forward pass on copies of the inputs, in eval mode, with the batch's statistics where there are some."""
    copies = map_tensors(lambda t: t.clone(), (args, kwargs))
    with measuring(model, batch_stats=True), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            with tape.record(model, tensors(copies)):
                model(*copies[0], **copies[1])
        except SignalError:
            raise
        except Exception as error:
            raise SignalError(f"the forward of {type(model).__name__} failed at {tape.last_module}: {error}") from error
