"""Talking to the tuned model."""
