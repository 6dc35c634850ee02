"""Reading pickles that may come from anywhere."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmssl.types import UserError


def load_plain(path: str | Path, allowed: Sequence[type] = (), map_location: Any = "cpu") -> Any:
    """`torch.load` that builds tensors, plain values and the `allowed` classes only.

    Raises:
        UserError: the file holds anything else; nothing of it has been executed.
    """
    with torch.serialization.safe_globals(list(allowed)):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: refused, for it holds more than tensors and plain values and could run "
                "code; use a checkpoint of a source you trust"
            ) from error
