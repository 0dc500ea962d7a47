"""Measurements of speed and memory: `hf-gg bench`, and what the scripts in `benchmarks/` share."""
