"""Benchmarks: `python -m benchmarks.hypergrad`, `python -m benchmarks.tapweight [molecules | text]`."""
