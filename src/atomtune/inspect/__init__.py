"""`atomtune inspect`: which tokens of the records are learned, and which records have problems."""
