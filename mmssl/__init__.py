"""mmssl: audio-visual-text pretraining on one shared transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmssl.embed.model import EmbeddingModel

__version__ = "0.1.0"


def load(path: Any, which: Any = "ema", device: str = "cpu") -> EmbeddingModel:
    """The embedding interface of a trained run; see `mmssl.embed.model.load`."""
    from mmssl.embed import model  # importing mmssl stays cheap

    return model.load(path, which, device)
