"""Bytes to values: every kind of source, and for each value its origin, such as "train.jsonl:17"."""
