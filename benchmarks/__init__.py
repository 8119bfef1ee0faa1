"""Benchmarks: each file answers one question; README.md has the results with commit, machine and versions."""
