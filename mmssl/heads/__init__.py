"""Heads: projections into common spaces, and scores."""
