"""Checkpoints of other libraries: import and export."""
