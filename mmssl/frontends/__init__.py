"""Front-ends: raw signals to token grids. The tables name what a configuration may ask for."""

from mmssl.frontends.patches import PatchEmbed
from mmssl.frontends.positions import FactorisedPositions
from mmssl.frontends.prosody import Prosody
from mmssl.frontends.spectra import LogMel, LogSpectrogram, SpectrumParams
from mmssl.frontends.stack import SpectrumStack
from mmssl.frontends.stems import ConvStem, VideoConvStem
from mmssl.frontends.text import FrozenTextEmbedding, TextEmbedding
from mmssl.frontends.video import Frames
from mmssl.frontends.waveform import Waveform

SIGNALS = {
    "log_mel": LogMel,
    "log_spectrogram": LogSpectrogram,
    "spectrum_stack": SpectrumStack,
    "prosody": Prosody,
    "waveform": Waveform,
    "frames": Frames,
}
STEMS = {"patches": PatchEmbed, "conv": ConvStem, "video_conv": VideoConvStem}
TEXTS = {"embedding": TextEmbedding, "frozen": FrozenTextEmbedding}

__all__ = [
    "SIGNALS",
    "STEMS",
    "TEXTS",
    "ConvStem",
    "FactorisedPositions",
    "Frames",
    "FrozenTextEmbedding",
    "LogMel",
    "LogSpectrogram",
    "PatchEmbed",
    "Prosody",
    "SpectrumParams",
    "SpectrumStack",
    "TextEmbedding",
    "VideoConvStem",
    "Waveform",
]
