"""Values to Records: which keys hold what."""
