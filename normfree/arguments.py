"""Types of arguments and of fields: what is not of the declared one is refused by name."""

import collections.abc
import functools
import inspect
import numbers
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")
_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise TypeError, which names the argument, for one of another type than it declares.

    Of containers the items are not looked at, but of tuples. What a `Literal` may be, and what an item may be, the
    function says itself.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # which Python says better
        hints = _hints(function)
        for name, value in given.items():
            if not is_of(value, hints.get(name, Any), lenient=True):
                raise TypeError(f"{name} is {_described(value)}; it must be {hint_words(hints[name])}")
        return function(*args, **kwargs)

    return call


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the hints of the arguments that `checked` looks at."""
    hints = get_type_hints(function)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: hints[p.name] for p in parameters if p.name in hints and p.kind not in variadic}


def _described(value: Any) -> str:
    return repr(value) if isinstance(value, numbers.Number | str | bytes | None) else f"a {type(value).__name__}"


def hint_words(hint: Any) -> str:
    """Say a type hint as in code."""
    if get_origin(hint) in (types.UnionType, Union):
        return " | ".join(map(hint_words, get_args(hint)))
    if get_origin(hint) is collections.abc.Callable:
        return "a function"
    if isinstance(hint, type) and not get_args(hint):
        package = hint.__module__.partition(".")[0]
        return hint.__name__.replace("NoneType", "None") if package == "builtins" else f"{package}'s {hint.__name__}"
    return str(hint).replace("typing.Literal", "one of ").replace("typing.", "").replace("collections.abc.", "")


def is_of(value: Any, hint: Any, *, lenient: bool = False) -> bool:
    """Tell whether a value is of a type; lists are tuples too, as JSON has none, and truth values no numbers.

    `lenient` takes 0 and 1 for truth values, and all values for a `Literal` or a type of variables.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar | str):
        return True
    if origin in (types.UnionType, Union):
        return any(is_of(value, argument, lenient=lenient) for argument in arguments)
    if origin is Literal:
        return lenient or value in arguments
    if origin is tuple:
        return isinstance(value, list | tuple) and all(is_of(item, arguments[0], lenient=lenient) for item in value)
    if origin is not None:
        return callable(value) if origin is collections.abc.Callable else isinstance(value, origin)
    if hint is bool:
        return isinstance(value, bool) or (lenient and isinstance(value, numbers.Integral) and value in (0, 1))
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    return isinstance(value, os.PathLike if hint is Path else hint)


def require_positive(**sizes: int | Sequence[int]) -> None:
    """Raise ValueError, which names it, for a size below 1."""
    for name, size in sizes.items():
        if not all(one >= 1 for one in (size if isinstance(size, Sequence) else (size,))):
            raise ValueError(f"{name} is {size}; it must be at least 1")


def require_moderate(**scales: float | None) -> None:
    """Raise ValueError, which names it, for a number that is not finite, or whose square float32 does not hold."""
    for name, scale in scales.items():
        if scale is not None and not abs(scale) < 1e18:
            raise ValueError(f"{name} is {scale}; it must be finite, and of a magnitude below 1e18")
