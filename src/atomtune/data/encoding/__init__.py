"""Records to Examples: the chat template, token ids, and shortening records that are too long."""
