"""What the texts of a data set are like: near-duplicates, statistics, writing systems, the hold-out split."""
