"""Networks with normalizers made into networks without."""

from normfree.conversion.conversion import Conversion, convert, load_converted
from normfree.conversion.plan import Change, Plan

__all__ = ["Change", "Conversion", "Plan", "convert", "load_converted"]
