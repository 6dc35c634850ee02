"""Backbones: token sequences to token sequences, and convolutional encoders."""

from mmssl.backbones.audio2vec import Audio2Vec
from mmssl.backbones.byola import BYOLA
from mmssl.backbones.convnets import ConvAV8, EfficientNetB0
from mmssl.backbones.pase import PASE
from mmssl.backbones.resnet import ResNetV2
from mmssl.backbones.s3d import S3DG
from mmssl.backbones.trunks import VGG16, AlexNet, ResNet18, ResNet50, SpeechConv
from mmssl.backbones.waves import SincNet, WaveResNet18

NETWORKS = {
    "alexnet": AlexNet,
    "audio2vec": Audio2Vec,
    "byol_a": BYOLA,
    "conv_av8": ConvAV8,
    "efficientnet_b0": EfficientNetB0,
    "pase": PASE,
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "resnet_v2": ResNetV2,
    "s3dg": S3DG,
    "sincnet": SincNet,
    "speech_conv": SpeechConv,
    "vgg16": VGG16,
    "wave_resnet18": WaveResNet18,
}

__all__ = [
    "BYOLA",
    "NETWORKS",
    "PASE",
    "S3DG",
    "VGG16",
    "AlexNet",
    "Audio2Vec",
    "ConvAV8",
    "EfficientNetB0",
    "ResNet18",
    "ResNet50",
    "ResNetV2",
    "SincNet",
    "SpeechConv",
    "WaveResNet18",
]
