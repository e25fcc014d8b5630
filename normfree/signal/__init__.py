"""Signal of any network: what its numbers are, what they say, at rest and while it trains."""

from normfree.errors import SignalError
from normfree.signal.figure import compare
from normfree.signal.measurement import characterize
from normfree.signal.monitor import SignalMonitor
from normfree.signal.record import SignalRecord
from normfree.signal.report import SignalReport
from normfree.signal.sweep_report import SweepReport
from normfree.signal.sweeping import sweep

__all__ = [
    "SignalError",
    "SignalMonitor",
    "SignalRecord",
    "SignalReport",
    "SweepReport",
    "characterize",
    "compare",
    "sweep",
]
