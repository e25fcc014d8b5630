"""Networks with normalizers made into networks without."""

from normfree.convert.conversion import Conversion, convert, load_converted, param_groups
from normfree.convert.plan import Change, Plan

__all__ = ["Change", "Conversion", "Plan", "convert", "load_converted", "param_groups"]
