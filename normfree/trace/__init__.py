"""Any model run once, watched from outside, and given back as it was."""
