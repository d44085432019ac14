"""What a person watches and what a run leaves behind."""
