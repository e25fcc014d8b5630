"""The choice of a cell's learning rate, by the validation images."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from normfree.studies.study import Cell, Rates, TrainingRow
from normfree.studies.trainings import StudyTables

_GIVE_UP = 5


def next_rate_and_seed(rates: Rates | None, cell: Cell, tables: StudyTables, seeds: int) -> tuple[float, int] | None:
    """Choose the learning rate and the seed of the cell's next training; None where all have run.

    The first seed tries the first rate, its neighbours, and on until both neighbours of the best are known. Where all
    fail it goes down alone, since beyond a rate that fails may be one that merely kills the network, and gives up after
    `_GIVE_UP` of them.
    """
    tried = tables.tried(cell, seeds)
    if rates is not None and rates.by_first_seed:
        tried = {lr: first for lr, trainings in tried.items() if (first := tuple(t for t in trainings if t.seed == 0))}
    if not tried:
        return (cell.recipe.lr if rates is None else rates.first), 0
    best = _best(rates, cell, tried)
    if rates is not None:
        failing = _mean(tried[best]) < 0
        if failing and len(tried) >= _GIVE_UP:
            return None
        of_first = () if failing else (rates.first / rates.factor, rates.first * rates.factor)
        for lr in (*of_first, best / rates.factor, *([] if failing else [best * rates.factor])):
            if lr not in tried:
                return lr, 0
    return next(((best, seed) for seed in range(1, seeds) if tables.trainings.find(cell, best, seed) is None), None)


def chosen_rate(rates: Rates | None, cell: Cell, tried: Mapping[float, Sequence[TrainingRow]]) -> float:
    """Return the best of the rates, of one at least, at which most seeds have trained."""
    most = max(map(len, tried.values()))
    return _best(rates, cell, {lr: trainings for lr, trainings in tried.items() if len(trainings) == most})


def _best(rates: Rates | None, cell: Cell, tried: Mapping[float, Sequence[TrainingRow]]) -> float:
    """Choose the rate of the highest mean; of equals the one nearest to the first, of failures the lowest."""
    first = cell.recipe.lr if rates is None else rates.first

    def merit(lr: float) -> tuple[float, float, float]:
        mean = _mean(tried[lr])
        return mean, 0 if mean < 0 else -abs(math.log(lr / first)), -lr

    return max(tried, key=merit)


def _mean(trainings: Sequence[TrainingRow]) -> float:
    """Average the accuracies, a failure counting as -1."""
    return fmean(-1.0 if training.validation is None else training.validation for training in trainings)
