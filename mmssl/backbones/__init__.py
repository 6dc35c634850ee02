"""Backbones: token sequences to token sequences, and convolutional encoders."""

from mmssl.backbones.convnets import ConvAV8, EfficientNetB0

NETWORKS = {"conv_av8": ConvAV8, "efficientnet_b0": EfficientNetB0}

__all__ = ["NETWORKS", "ConvAV8", "EfficientNetB0"]
