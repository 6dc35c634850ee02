"""Reading pickles that may come from anywhere."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from mmssl.types import UserError


@contextmanager
def plain_loads(allowed: Sequence[type]) -> Iterator[None]:
    """Whatever calls `torch.load` inside goes through `load_plain`, whatever it asks for."""
    original = torch.load

    def load(path: Any, map_location: Any = None, **_: Any) -> Any:
        return _load(original, path, allowed, map_location)

    torch.load = cast("Any", load)
    try:
        yield
    finally:
        torch.load = original


@contextmanager
def quiet() -> Iterator[None]:
    """Swallow what is printed inside."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def load_plain(path: str | Path, allowed: Sequence[type] = (), map_location: Any = "cpu") -> Any:
    """`torch.load` that builds tensors, plain values and the `allowed` classes only.

    Raises:
        UserError: the file holds anything else; nothing of it has been executed.
    """
    return _load(torch.load, path, allowed, map_location)


def _load(load: Any, path: Any, allowed: Sequence[type], map_location: Any) -> Any:
    with torch.serialization.safe_globals(list(allowed)):
        try:
            return load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: refused, for it holds more than tensors and plain values and could run "
                "code; use a checkpoint of a source you trust"
            ) from error
