"""`atomtune plan`: what a run would cost in tokens, memory and time, before its model is loaded."""
