"""Checkpoints: found, written complete or not at all, and read without running code in them."""
