"""A sweep: the signal of a network over widths, depths or any argument, at initialisation and after some steps."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfree.arguments import checked
from normfree.files.csv_tables import append_csv, read_csv, reading_rows
from normfree.signal.sweep_point import (
    QUANTITIES,
    Experiment,
    Place,
    adam,
    arguments_of,
    class_loss,
    measure_point,
    noise_and_labels,
    points_of,
)
from normfree.signal.sweep_report import SweepReport

_FIRST = ("of", "seed")
_LAST = ("places", "kind", "position", "place", *QUANTITIES)


@checked
def sweep(
    factory: Callable[..., nn.Module],
    over: Mapping[str, Sequence[Any]],
    *,
    data: Callable[..., tuple[Any, Any]] = noise_and_labels,
    optimizer: Callable[..., Any] = adam,
    loss: Callable[[Any, Any], Tensor] = class_loss,
    steps: int = 1,
    seeds: int = 3,
    processes: int = 0,
    path: str | Path | None = None,
) -> SweepReport:
    """Measure a network's signal over values of its arguments: the coordinate check of µP, for any network.

    At each combination of values, and for each seed, a network is made, its signal measured at every weight layer and
    residual join, trained for some steps on one batch, and measured on that again (Yang et al. 2022, arXiv 2203.03466,
    appendix D.1; the statistics are those of `characterize`). A learning rate transfers over an argument where no
    change grows or shrinks with it.

    ::

        normfree.sweep(mlp, {"width": [128, 256, 512, 1024]}).save("widths.png")

    Args:
        factory: Function that makes the network.
        over: Names of arguments, and the values of each. An argument is given to every function among factory, data and
            optimizer that names it.
        data: Function of the model that returns inputs and targets; unless given, 16 examples of white noise.
        optimizer: Function of the model that makes its optimizer; unless given, Adam at a rate of 0.001.
        loss: Function of outputs and targets; unless given, cross-entropy, to classes in turn where there are no
            targets.
        steps: Steps of the optimizer; 0 for the signal at initialisation alone.
        seeds: Networks at each combination; torch is seeded with 0, 1, 2, …
        processes: Processes that measure at once; 0 for none but this one. The functions must be importable.
        path: A .csv file that grows by each network that was measured; those that it holds are not measured again.

    Returns:
        Report with a slope for each quantity and place.

    Raises:
        ValueError: For arguments that nothing takes or that have no values, and for a file of another sweep.
        SignalError: Where a network cannot be measured.
    """
    if steps < 0 or seeds < 1 or processes < 0:
        raise ValueError(f"steps is {steps}, seeds {seeds}, processes {processes}; they must be at least 0, 1 and 0")
    values = _values(over)
    experiment = Experiment(factory, data, optimizer, loss, steps)
    taken = arguments_of(experiment, list(values))
    table = None if path is None else _Rows(Path(path), experiment, list(values))
    found = {} if table is None else table.read()
    wanted = [(point, seed) for point in points_of(values) for seed in range(seeds)]
    missing = [(point, seed) for point, seed in wanted if _key(point, seed) not in found]
    for point, seed, places in _measured(experiment, missing, processes, len(wanted)):
        found[_key(point, seed)] = places
        if table is not None:
            table.add(point, seed, places)
    networks = [(point, seed, found[_key(point, seed)]) for point, seed in wanted]
    return SweepReport(_name(factory), values, steps, networks, next(iter(values)) in taken["factory"])


def _values(over: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    values = {name: list(given) for name, given in over.items()}
    empty = [name for name, given in values.items() if not given]
    if not values or empty:
        raise ValueError(f"there are no values of {empty[0]}" if empty else "name an argument to sweep over")
    for name, given in values.items():
        if len({str(value) for value in given}) < len(given):
            raise ValueError(f"a value of {name} is given twice: {given}")
    if clash := values.keys() & {*_FIRST, *_LAST}:
        raise ValueError(f"an argument cannot be called {sorted(clash)[0]!r} here: wrap the factory")
    return values


def _measured(
    experiment: Experiment, missing: Sequence[tuple[dict[str, Any], int]], processes: int, total: int
) -> Iterator[tuple[dict[str, Any], int, list[Place]]]:
    """Measure what is missing, with a bar on a terminal; what has been measured is given before a fault is raised."""
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(_bar(total - len(missing), total))
        if not processes:
            for point, seed in missing:
                yield point, seed, measure_point(experiment, point, seed)
                advance()
            return
        try:
            pickle.dumps(experiment)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise ValueError(
                f"another process cannot import these functions ({error}): define them at the top of a module, or take "
                "processes=0"
            ) from error
        threads = max(1, torch.get_num_threads() // processes)
        pool = stack.enter_context(
            concurrent.futures.ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
            )
        )
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        jobs = {pool.submit(measure_point, experiment, point, seed): (point, seed) for point, seed in missing}
        for job in concurrent.futures.as_completed(jobs):
            yield *jobs[job], job.result()
            advance()


@contextlib.contextmanager
def _bar(done: int, total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sweep", total=total, completed=done)
        yield lambda: bar.advance(task)


class _Rows:
    """The file of a sweep: a row per network and place."""

    def __init__(self, path: Path, experiment: Experiment, arguments: list[str]) -> None:
        if path.suffix.lower() != ".csv":
            raise ValueError(f"cannot write {path}: the suffix must be .csv")
        self.path = path
        self.arguments = arguments
        functions: tuple[Any, ...] = (experiment.factory, experiment.data, experiment.optimizer, experiment.loss)
        self.of = f"{', '.join(map(_name, functions))}, {experiment.steps} steps"
        self.columns = (*_FIRST, *arguments, *_LAST)

    def read(self) -> dict[Any, list[Place]]:
        """Read the networks that are there whole. Raises ValueError for the file of another sweep."""
        columns, rows = read_csv(self.path)
        if columns and (columns != self.columns or any(row["of"] != self.of for row in rows)):
            raise ValueError(f"{self.path} is no file of this sweep: choose another place")
        found: dict[Any, list[Place]] = {}
        expected: dict[Any, int] = {}
        with reading_rows(self.path):
            for row in rows:
                key = _key({name: row[name] for name in self.arguments}, int(row["seed"]))
                numbers = {name: float(row[name]) for name in QUANTITIES}
                place = Place(row["kind"], int(row["position"]), row["place"], numbers)
                if (place.kind, place.position) not in [(other.kind, other.position) for other in found.get(key, [])]:
                    found.setdefault(key, []).append(place)
                expected[key] = int(row["places"])
        return {key: places for key, places in found.items() if len(places) == expected[key]}

    def add(self, point: Mapping[str, Any], seed: int, places: Sequence[Place]) -> None:
        """Append a network's rows, so that they outlive this process."""
        first = {"of": self.of, "seed": seed} | dict(point)
        rows = [
            first | {"places": len(places), "kind": p.kind, "position": p.position, "place": p.name} | dict(p.numbers)
            for p in places
        ]
        append_csv(self.path, self.columns, rows)


def _key(point: Mapping[str, Any], seed: int) -> Any:
    return tuple(str(value) for value in point.values()), seed


def _name(function: Any) -> str:
    """Name a function, and what it is given already."""
    if isinstance(function, functools.partial):
        given = [*map(str, function.args), *(f"{name}={value}" for name, value in sorted(function.keywords.items()))]
        return f"{_name(function.func)}({', '.join(given)})"
    return getattr(function, "__qualname__", type(function).__name__)
