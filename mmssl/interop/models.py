"""All model types that can be imported and exported."""

from __future__ import annotations

from typing import Any

from mmssl.interop import speech, text, vision
from mmssl.interop.layout import Layout
from mmssl.types import UserError

LAYOUTS = {
    layout.name: layout
    for layout in (
        speech.WAV2VEC2,
        speech.WAV2VEC2_CONFORMER,
        speech.HUBERT,
        speech.WAVLM,
        speech.DATA2VEC_AUDIO,
        vision.VIT_MAE,
        vision.VIDEO_MAE,
        text.BERT,
    )
}


def layout_of(name: Any, where: str) -> Layout:
    """What is known of a model type.

    Raises:
        UserError: nothing.
    """
    if name not in LAYOUTS:
        raise UserError(f"{where}: {name!r} is not known; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
