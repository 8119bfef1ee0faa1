"""The tuned model against the engine that serves it, request by request.

Our side is the adapter on its base, as training left it. The engine's side is a program started as a user would start
it, asked through its own endpoint. Five things must agree: the ids of a prompt, the log-probabilities of the reference
answer, the greedy text up to ties, that it is the tuned model and not its base, and where an answer stops.
"""
