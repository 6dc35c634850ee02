"""Backbones: token sequences to token sequences, and convolutional encoders."""

from mmssl.backbones.convnets import ConvAV8, EfficientNetB0
from mmssl.backbones.resnet import ResNetV2
from mmssl.backbones.s3d import S3DG

NETWORKS = {
    "conv_av8": ConvAV8,
    "efficientnet_b0": EfficientNetB0,
    "resnet_v2": ResNetV2,
    "s3dg": S3DG,
}

__all__ = ["NETWORKS", "S3DG", "ConvAV8", "EfficientNetB0", "ResNetV2"]
