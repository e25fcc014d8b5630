"""What the networks cost beside what people would use instead: run by `normfree bench`."""
