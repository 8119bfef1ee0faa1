"""How well models answer: base against tuned, on records that were not learned."""
