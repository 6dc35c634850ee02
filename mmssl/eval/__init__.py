"""Evaluation: frozen encoders, fixed protocols, trivial baselines beside every number."""
