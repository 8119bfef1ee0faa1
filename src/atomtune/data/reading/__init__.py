"""Bytes to values: every source of records, each value with the place it stands at."""
