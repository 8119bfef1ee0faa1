"""The computed map of the house and the signs to look at: `make house`."""
