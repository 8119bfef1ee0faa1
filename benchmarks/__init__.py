"""Benchmarks: one file per question; results with commit, machine and versions in README.md."""
