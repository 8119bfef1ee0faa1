"""Values to Records: the supported formats, and what their keys mean."""
