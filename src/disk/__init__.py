"""What survives a kill, a power cut and a full disk."""
