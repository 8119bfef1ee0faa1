"""Many runs with different settings, to find the best ones."""
