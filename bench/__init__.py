"""Benchmarks: hostos beside a peer in the same run, reported as ratios (docs/benchmarks.md)."""
