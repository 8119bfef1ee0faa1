"""`make house`: the computed map of the source, and signs of code to look at."""
