"""Every node looked at before a run: what it has, what it measures, and where it differs from the others.

`node` and `files` look at one machine, `rates` measures what its ranks do together, `verdict` compares the nodes.
"""
