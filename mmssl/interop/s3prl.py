"""The interface of an upstream of s3prl for a trained model.

`mmssl export RUN OUT format=s3prl` writes weights and a hubconf.py, whose entry is the run's name:
`torch.hub.load(OUT, NAME, source="local")`.

Letters in shapes: B utterances, S samples, T frames, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmssl.embed.model import load
from mmssl.interop.frames import SoundFrames
from mmssl.types import UserError

RATE = 16000


class UpstreamExpert(nn.Module):
    """Frozen features of utterances at 16 kHz."""

    def __init__(self, ckpt: str | Path, tower: str | None = None) -> None:
        super().__init__()
        embedding = load(ckpt)
        self.network = embedding.model  # moves with the module from device to device
        self.frames = SoundFrames(embedding, tower)
        self.samples = round(RATE / self.frames.rate_hz)

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame, of every key."""
        return self.samples

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Features of B sounds (S,) of any lengths.

        Returns:
            `hidden_states`: (B, T, D) of what enters the transformer and of each layer, zero behind
            an utterance; T is its samples / `get_downsample_rates`, rounded. `last_hidden_state`:
            the tower's output, after a final norm.

        Raises:
            UserError: not a list of 1-D tensors.
        """
        if not len(wavs) or any(wav.ndim != 1 for wav in wavs):
            raise UserError("wavs: expected a list of 1-D tensors at 16 kHz")
        layers, _ = self.frames.on_grid([*wavs], RATE, self.samples / RATE)
        padded = [
            pad_sequence(list(each), batch_first=True).to(wavs[0].device)
            for each in zip(*layers, strict=True)
        ]
        return {"hidden_states": padded[:-1] or padded, "last_hidden_state": padded[-1]}


def entry(folder: Path) -> Callable[..., UpstreamExpert]:
    """A hubconf entry: without a checkpoint it reads the weights in the folder."""

    def upstream(ckpt: str | Path = "", **options: Any) -> UpstreamExpert:
        return UpstreamExpert(ckpt or folder, **options)

    return upstream


HUBCONF = '''"""Entry point of torch.hub and s3prl; the weights lie in this folder."""

dependencies = ["mmssl", "torch"]

from pathlib import Path

from mmssl.interop.s3prl import entry

{name} = entry(Path(__file__).parent)
'''
