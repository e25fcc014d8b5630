"""How a signal flows through any network."""

from normfree.errors import SignalError
from normfree.signal.figure import compare
from normfree.signal.measurement import characterize
from normfree.signal.report import SignalRecord, SignalReport

__all__ = ["SignalError", "SignalRecord", "SignalReport", "characterize", "compare"]
