"""mmssl: audio-visual-text pretraining on one shared transformer."""

__version__ = "0.1.0"
