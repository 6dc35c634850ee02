"""Losses and choices of negatives, as pure functions of tensors."""
