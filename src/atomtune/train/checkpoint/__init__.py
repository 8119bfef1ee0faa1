"""Checkpoints: found, written whole or not at all, read back without running anything."""
