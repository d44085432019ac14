"""A run's checkpoints: saving, manifest, reading on any layout, export."""
