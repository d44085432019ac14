"""What a run needs before it starts: memory, time, disk. Pure functions of a config; no torch, no model built."""
