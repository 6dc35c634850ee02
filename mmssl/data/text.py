"""Captions to token ids and back, by a SentencePiece model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mmssl.types import UserError

MASK = "<mask>"
_WORD = "\u2581"  # SentencePiece's mark of a space in front


class Tokenizer:
    """A SentencePiece model with ids for padding, unknown, begin, end and mask.

    The model's bytes travel inside checkpoints; `sha256` identifies them.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """Load a model from its bytes.

        Raises:
            UserError: not a SentencePiece model, or one without our special pieces.
        """
        import sentencepiece

        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{name}: not a SentencePiece model ({error})") from error
        self.pad_id = int(self._processor.pad_id())
        self.unk_id = int(self._processor.unk_id())
        self.bos_id = int(self._processor.bos_id())
        self.eos_id = int(self._processor.eos_id())
        self.mask_id = int(self._processor.piece_to_id(MASK))
        if self.pad_id != 0 or min(self.bos_id, self.eos_id) < 0 or self.mask_id == self.unk_id:
            raise UserError(
                f"{name}: needs pad id 0, begin and end ids and the piece {MASK}; "
                "train one with python -m data_tools.train_tokenizer"
            )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `.model` file.

        Raises:
            UserError: the file is missing or no usable model.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"{path}: no such tokenizer; train one with python -m data_tools.train_tokenizer"
            )
        return cls(path.read_bytes(), str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return int(self._processor.vocab_size())

    @property
    def special(self) -> dict[str, int]:
        """Ids of the special pieces by name."""
        return {
            "pad": self.pad_id,
            "unk": self.unk_id,
            "bos": self.bos_id,
            "eos": self.eos_id,
            "mask": self.mask_id,
        }

    @property
    def begins(self) -> list[bool]:
        """Of every id, whether its piece begins a word."""
        pieces = (self._processor.id_to_piece(i) for i in range(self.vocab_size))
        return [piece.startswith(_WORD) for piece in pieces]

    def encode(self, text: str, length: int) -> list[int]:
        """At most `length` ids, the last of which is always the end marker; no padding."""
        ids: list[int] = self._processor.encode(text)
        return [*ids[: length - 1], self.eos_id]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special pieces are left out."""
        hidden = {self.pad_id, self.bos_id, self.eos_id}
        return str(self._processor.decode([int(i) for i in ids if int(i) not in hidden]))

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]
