"""Settings: every one declared once, read from flags and YAML, checked before anything is touched."""
