"""Certify: compares the tuned model with the engine that serves it, request by request.

Our side is the adapter on its base, as training left it. The engine is started as a user would start it, and sent
requests over its own endpoint. Five things must agree: the prompt ids, the log-probabilities of the reference answer,
the greedy text except for ties, that it is the tuned model and not its base, and where an answer stops.
"""
