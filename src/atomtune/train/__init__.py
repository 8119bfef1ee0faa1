"""One training run, from settings to a saved adapter and its record."""
