"""Settings: each is declared once, read from flags and YAML, and checked before anything starts."""
