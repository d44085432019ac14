"""Checks every node before a run: what it has, what it measures, and where it differs from the others.

`node` and `files` check one machine, `measure` what the ranks do together, `verdict` compares the nodes.
"""
