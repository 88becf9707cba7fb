"""Measurements against other libraries and other settings; docs/benchmarks.md has their figures."""
