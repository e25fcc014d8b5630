"""The measurement: one watched run of any model, made into a report."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfree.arguments import checked
from normfree.errors import SignalError
from normfree.signal.prediction import predict as predict_signal
from normfree.signal.reader import Reader
from normfree.signal.record import SignalRecord
from normfree.signal.report import SignalReport
from normfree.trace.inputs import as_call, describe, noise
from normfree.trace.joins import Join
from normfree.trace.preparation import (
    closed_multipliers,
    closed_parameters,
    is_normalizer,
    isolated_rng,
    opened_branches,
    standardizes_weights,
)
from normfree.trace.progress import telling
from normfree.trace.tape import Tape
from normfree.trace.watched import exclusively, refuse_unrunnable, run_watched


@exclusively
@checked
def characterize(
    model: nn.Module | Callable[[], nn.Module],
    inputs: Any = None,
    *,
    seeds: int = 1,
    open_branches: bool = True,
    batch_stats: bool = True,
    backward: bool = False,
    predict: bool = False,
    name: str | None = None,
) -> SignalReport:
    """Measure the signal of a model: channel statistics at every residual join (Brock et al. 2021, section 3).

    Every module is in eval mode for the run, so dropout is off and detectors ask for no targets. The model comes back
    as it was, also when its forward raises, and so does torch's random state.

    Args:
        model: A module, or a factory of one.
        inputs: A tensor, a tuple (positional arguments), a dict (keyword arguments), a list (one argument, as
            torchvision's detectors take), a DataLoader (its first batch), or a function of the model that returns one
            of these, called once a seed; None: white noise of the model's declared input size, or 4×3×224×224.
        seeds: Number of repetitions. In each, torch is seeded with 0, 1, 2, …, whatever the user has seeded, then the
            noise (or what the function returns) is drawn, and with a factory the parameters before it.
        open_branches: Set to one, for the measurement, what closes branches at initialisation: zero SkipInit gains,
            zero weights of normalizers, LayerScale.
        batch_stats: BatchNorm normalizes with the statistics of the batch, as in training, unless it is frozen; its
            buffers are not touched. False: with its running statistics.
        backward: Also measure the gradients, for a random cotangent: each output times v ~ N(0, 1), summed.
        predict: Also say what squared mean and variance should be, from weights and structure alone.
        name: Name of the model in the report.

    Returns:
        One record per join (or per weight layer where there is no join), with verdicts.

    Raises:
        SignalError: When the forward fails or reaches no weight layer; names the module last reached.
        ValueError: For arguments that cannot be used.
        TypeError: For a model or inputs of another type.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be at least 1")
    is_module = isinstance(model, nn.Module)
    if not callable(model):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module, or a function that makes one")
    drawn = inputs is None or (callable(inputs) and not isinstance(inputs, Tensor))
    if is_module and seeds > 1 and not drawn:
        raise ValueError(
            f"seeds is {seeds}, but neither this model nor these inputs are drawn: give a factory, or None"
        )
    reports = []
    for seed in range(seeds):
        with isolated_rng(), torch.inference_mode(False):
            torch.manual_seed(seed)
            net = _made(model)
            batch = noise(net) if inputs is None else inputs(net) if callable(inputs) and drawn else inputs
            measurement = _Measurement(net, *as_call(batch, net), batch_stats=batch_stats, backward=backward)
            with telling(f"measuring {type(net).__name__}"):
                reports.append(measurement.report(open_branches, predict))
    merged = SignalReport.merge(reports)
    return dataclasses.replace(merged, model=name or _name_of(model))


def characterize_on_tape(model: nn.Module, inputs: Any) -> tuple[SignalReport, Tape]:
    """Return what `characterize` does, and the tape that it was read from."""
    with isolated_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        measurement = _Measurement(_made(model), *as_call(inputs, model), batch_stats=True, backward=False)
        with telling(f"measuring {type(model).__name__}"):
            report = measurement.report(open_branches=True)
    return dataclasses.replace(report, model=_name_of(model)), measurement.tape


def _made(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return the module, or what the factory makes; eager, and such that it can run."""
    net = model if isinstance(model, nn.Module) else model()
    if not isinstance(net, nn.Module):
        raise TypeError(f"the factory returned a {type(net).__name__}; it must return a torch.nn.Module")
    net = getattr(net, "_orig_mod", net)  # torch.compile keeps the eager module there
    refuse_unrunnable(net)
    return net


class _Measurement:
    """One model on one batch."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, batch_stats: bool, backward: bool
    ) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.batch_stats = batch_stats
        self.backward = backward
        self.tape = Tape()  # of the last run

    def report(self, open_branches: bool, predict: bool = False) -> SignalReport:
        """Measure the signal and, with `predict`, what is expected of it."""
        report = self._report(open_branches)
        return self._with_prediction(report) if predict else report

    def _report(self, open_branches: bool) -> SignalReport:
        closed = closed_parameters(self.model)
        records = self._measure(closed if open_branches else [])
        if not records.joins:
            records = self._measure(closed if open_branches else [], weight_layers=True)
        else:
            # LayerScale and the like are known by what they do: they multiply the end of a branch.
            multipliers = {p for join in records.joins for p in join.parameters} - set(closed)
            closed = closed + closed_multipliers(self.model, multipliers)
            if open_branches and len(closed) > len(records.opened):
                records = self._measure(closed)
            elif not open_branches and any(r.residual_variance is None for r in records.rows):
                # A branch multiplied by 0 shows nothing of itself.
                after = self._measure(closed)
                records.rows = [
                    dataclasses.replace(row, residual_variance=other.residual_variance)
                    if row.residual_variance is None
                    else row
                    for row, other in zip(records.rows, after.rows, strict=True)
                ]
        if not records.rows:
            raise SignalError(
                f"{type(self.model).__name__} passed its inputs through no weight layer: nothing to measure"
            )
        return SignalReport(
            model=type(self.model).__name__,
            inputs=describe(self.args, self.kwargs),
            kind="join" if records.joins else "weight layer",
            records=tuple(records.rows),
            opened=tuple(records.opened),
            normalizers=tuple(sorted({type(m).__name__ for m in self.model.modules() if is_normalizer(m)})),
            standardized=any(map(standardizes_weights, self.model.modules())),
        )

    def _with_prediction(self, report: SignalReport) -> SignalReport:
        with opened_branches(self.model, list(report.opened)):
            found = predict_signal(
                self.model, self.args, self.kwargs, batch_stats=self.batch_stats, weight_layers=report.kind != "join"
            )
        values, unpredicted = found.values, found.unpredicted
        if len(values) != len(report):
            values, unpredicted = (None,) * len(report), ("a forward that does other things with fewer examples",)
        records = [
            dataclasses.replace(record, predicted_squared_mean=value[0], predicted_variance=value[1])
            if value
            else record
            for record, value in zip(report, values, strict=True)
        ]
        return dataclasses.replace(
            report, records=tuple(records), assumptions=found.assumptions, unpredicted=unpredicted
        )

    def _measure(self, names: list[str], weight_layers: bool = False) -> "_Records":
        tape = self.tape = Tape()
        reader = Reader(self.model, tape)
        with opened_branches(self.model, names):
            run_watched(
                self.model,
                tape,
                self.args,
                self.kwargs,
                batch_stats=self.batch_stats,
                reduce_weight_layers=weight_layers,
                on_gradient=reader.keep_gradient if self.backward else None,
            )
            reader.read()
            return _Records(reader.records(), reader.joins, names)


@dataclasses.dataclass
class _Records:
    rows: list[SignalRecord]
    joins: list[Join]
    opened: list[str]


def _name_of(model: Any) -> str:
    if isinstance(model, nn.Module):
        return type(getattr(model, "_orig_mod", model)).__name__
    return getattr(model, "__name__", type(model).__name__)
