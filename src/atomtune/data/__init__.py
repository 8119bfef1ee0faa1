"""Text and ids only: from a line in a file to an Example. No torch here."""
