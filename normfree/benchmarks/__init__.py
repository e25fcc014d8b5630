"""Benchmarks: costs beside those of the networks that people would use instead; run by `normfree bench`."""
