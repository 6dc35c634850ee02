"""Backbones: token sequences to token sequences, and convolutional encoders."""

from mmssl.backbones.convnets import ConvAV8, EfficientNetB0
from mmssl.backbones.trunks import VGG16, ResNet18, SpeechConv

NETWORKS = {
    "conv_av8": ConvAV8,
    "efficientnet_b0": EfficientNetB0,
    "resnet18": ResNet18,
    "speech_conv": SpeechConv,
    "vgg16": VGG16,
}

__all__ = ["NETWORKS", "VGG16", "ConvAV8", "EfficientNetB0", "ResNet18", "SpeechConv"]
