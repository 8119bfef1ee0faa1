"""`atomtune plan`: estimates the tokens, memory and time of a run without loading the model."""
