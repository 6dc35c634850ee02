"""Vectors of a trained model for media of any kind and length: `mmssl.load(run).encode(...)`."""
