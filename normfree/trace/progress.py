"""Progress of long measurements: what is being done and where, on standard error, once it has taken some seconds."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

_SILENT = 5.0  # seconds
_BETWEEN = 0.5  # on a terminal; elsewhere a line is written when the time has doubled


@dataclass
class _Told:
    """Report of a measurement that goes on."""

    what: str
    start: float = field(default_factory=lambda: time.monotonic())
    due: float = _SILENT
    written: bool = False

    def at(self, path: str) -> None:
        """Write the line, if it is due."""
        seconds = time.monotonic() - self.start
        if seconds < self.due or sys.stderr is None:
            return
        line = f"normfree: {self.what}{f', at {path}' if path else ''} ({seconds:.0f} s)"
        with contextlib.suppress(OSError, ValueError):  # closed, or full
            if sys.stderr.isatty():
                sys.stderr.write(f"\r\x1b[K{line}")
                self.due = seconds + _BETWEEN
                self.written = True
            else:
                sys.stderr.write(f"{line}\n")
                self.due = 2 * seconds
            sys.stderr.flush()

    def end(self) -> None:
        """Take the line away from a terminal."""
        if self.written:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()


class _Here(threading.local):
    told: _Told | None = None


_here = _Here()


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Tell on standard error what is being done, or what part of it, if it takes longer than five seconds."""
    outer = _here.told
    if outer is not None:
        before, outer.what = outer.what, f"{outer.what}, {what}"
        try:
            yield
        finally:
            outer.what = before
        return
    told = _here.told = _Told(what)
    try:
        yield
    finally:
        _here.told = None
        told.end()


def reached(path: str) -> None:
    """Say where the measurement that is told of has come to."""
    if _here.told is not None:
        _here.told.at(path)
