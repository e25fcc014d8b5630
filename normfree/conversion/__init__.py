"""Networks with normalizers made into networks without."""

from normfree.conversion.conversion import Conversion, convert
from normfree.conversion.plan import Change, Plan
from normfree.conversion.saving import load_converted

__all__ = ["Change", "Conversion", "Plan", "convert", "load_converted"]
