"""One module a command; imported by the cli alone."""
