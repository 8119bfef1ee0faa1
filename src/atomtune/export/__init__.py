"""From an adapter to other forms of the model."""
