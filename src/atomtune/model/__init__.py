"""The base model, its adapter, the loss and the answer."""
