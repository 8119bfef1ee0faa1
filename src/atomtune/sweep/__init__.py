"""Many runs with different settings, and which settings to take."""
