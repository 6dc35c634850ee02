"""What the interoperation must know of one architecture of another library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmssl.interop.entries import Flat, Key
from mmssl.interop.names import Row, Sizes
from mmssl.specs import Modality


@dataclass(frozen=True)
class Heads:
    """What one of their classes has for pre-training, and the task that it is here.

    name: their class. marker: a tensor of theirs that is there only with these heads. keys: entries
    of config.json; constants: what the task says whatever config.json says; rows: tensors.
    """

    name: str
    marker: str
    keys: tuple[Key, ...]
    constants: Mapping[str, Any]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Layout:
    """One model type.

    name: their `model_type`. encoder: the class of the encoder alone. prefix: of its tensors inside
    other classes. keys: entries of config.json; constants: what the tower and the view say whatever
    config.json says; rows: tensors. heads: the first of which the marker is found counts.
    files: entries of preprocessor_config.json, `preprocessor` what else is written there.
    aliases: patterns of older names and what they are today; None = such a tensor is nothing of its
    own. spare: tensors of the encoder that only a task could take. needs: their encoder cannot do
    without, with the reason why a run may not have them. without: why other heads are refused.
    """

    name: str
    modality: Modality
    encoder: str
    prefix: str
    keys: tuple[Key, ...]
    constants: Mapping[str, Any]
    rows: tuple[Row, ...]
    sizes: Callable[[Flat], Sizes]
    task: str = ""
    heads: tuple[Heads, ...] = ()
    files: tuple[Key, ...] = ()
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[tuple[str, str | None], ...] = ()
    spare: tuple[str, ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict)
    without: str = ""
