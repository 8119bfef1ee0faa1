"""Analysis of a data set's texts: near-duplicates, statistics, writing systems, the hold-out split."""
