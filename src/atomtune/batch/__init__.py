"""Batches: Examples → Rows → tensors, and which tokens attend to which (docs/geometry.md)."""
