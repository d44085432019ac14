"""One rank of a job of many, on a machine of its own: its memory and its work are real, its collectives are not."""
