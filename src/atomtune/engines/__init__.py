"""The programs that serve a model: each is started as a user would start it, and sent requests over HTTP."""
