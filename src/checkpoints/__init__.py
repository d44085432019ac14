"""Hugging Face weights in and out, streamed: `source.read(name, start, stop)`, and loops from a source to a sink."""
