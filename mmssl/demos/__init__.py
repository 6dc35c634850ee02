"""Demonstrations on a user's own files."""
