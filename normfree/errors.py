"""Errors that the user can mend, and suggestions for misspelled names."""

import difflib
from collections.abc import Iterable


class SignalError(RuntimeError):
    """A model that cannot be measured, or whose signal is not as it was asked to be."""


class TrainingError(RuntimeError):
    """A training that cannot begin or go on."""


class NotFiniteError(TrainingError):
    """A training whose loss, gradient or parameters are not finite."""


class SingleValueError(TrainingError):
    """A normalizer over a batch that has one value for each of its channels."""


class WritingError(TrainingError, OSError):
    """A file that cannot be written; the one that was there is as it was."""


class ChartError(RuntimeError):
    """A chart that cannot be drawn here."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Near misses of `name` among the `known` names, as the end of a sentence: "; did you mean …?", or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else ""
