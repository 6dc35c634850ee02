"""The common API of HEAR (Turian et al. 2022) for a trained model.

`mmssl export RUN OUT format=hear` writes weights and a module that names them; this one reads any
run: `hear-validator mmssl.interop.hear --model RUN`.

Letters in shapes: N sounds, S samples, T frames, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.embed.model import EmbeddingModel, load
from mmssl.embed.spaces import TOWERS
from mmssl.interop.frames import SoundFrames
from mmssl.types import UserError

RATES = (16000, 22050, 32000, 44100, 48000)  # those that HEAR has audio of
_STEP_S = 0.05  # longest time between frames that transcription tolerates


class HearModel(nn.Module):
    """What HEAR's functions take: sampling rate and widths, and the weights.

    space: of scene embeddings; default the sound tower's own, not projected to a common space.
    tower: of frames; default the first that reads sound.
    """

    def __init__(
        self, path: str | Path, space: str | None = None, tower: str | None = None
    ) -> None:
        super().__init__()
        self.embedding: EmbeddingModel = load(path)
        self.network = self.embedding.model  # moves with the module from device to device
        self.frames = SoundFrames(self.embedding, tower)
        self.space = space or TOWERS + self.frames.tower
        self.sample_rate = next((rate for rate in RATES if rate >= self.frames.hz), RATES[-1])
        self.step_s = min(_STEP_S, 1 / self.frames.rate_hz)
        self.timestamp_embedding_size = self.frames.widths[-1]
        silence = (torch.zeros(self.sample_rate), self.sample_rate)
        vector = self.embedding.encode({"audio": silence}, space=self.space, threads=0)
        self.scene_embedding_size = len(vector)

    def sounds(self, audio: Tensor) -> list[Tensor]:
        """The rows of a batch.

        Raises:
            UserError: it is no (sounds, samples).
        """
        if audio.ndim != 2:
            raise UserError(f"audio: expected (sounds, samples), found {tuple(audio.shape)}")
        return list(audio.detach().cpu())


def load_model(model_file_path: str | Path, **options: Any) -> HearModel:
    """The model of a run, a checkpoint or an exported folder; options: `space`, `tower`."""
    return HearModel(model_file_path, **options)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """(N, T, D) frames of (N, S) sounds in [-1, 1], and the (N, T) times of their centres in ms."""
    layers, times = model.frames.on_grid(model.sounds(audio), model.sample_rate, model.step_s)
    frames = torch.stack([each[-1] for each in layers])
    return frames.to(audio.device), 1000 * torch.stack(times).to(audio.device)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """(N, D) unit vectors of (N, S) sounds in [-1, 1]."""
    sounds = [{"audio": (wave_S, model.sample_rate)} for wave_S in model.sounds(audio)]
    return model.embedding.encode(sounds, space=model.space).to(audio.device)


def bound(folder: Path) -> Callable[..., HearModel]:
    """`load_model` of an exported module: without a path it reads the weights beside it."""

    def load_model(model_file_path: str | Path = "", **options: Any) -> HearModel:
        return HearModel(model_file_path or folder, **options)

    return load_model


MODULE = '''"""HEAR's common API for {name}; the weights lie in the folder above."""

from pathlib import Path

from mmssl.interop.hear import bound, get_scene_embeddings, get_timestamp_embeddings

__all__ = ["get_scene_embeddings", "get_timestamp_embeddings", "load_model"]

load_model = bound(Path(__file__).parents[1])
'''
