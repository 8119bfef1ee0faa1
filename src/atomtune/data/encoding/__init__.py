"""Records to Examples: the chat template, token ids, and what is done with records that are too long."""
