"""Deep networks without activation normalization, and the tools to see why they work."""
