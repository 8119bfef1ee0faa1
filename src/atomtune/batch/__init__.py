"""Geometry: from Examples to Rows and tensors."""
