"""What the layers of every encoder are made of: per-modality copies, feed-forwards, options.

B rows, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.backbones.dropout import Dropout
from mmssl.types import UserError

INITS = ("xavier", "normal")


@dataclass(frozen=True)
class LayerOptions:
    """What all layers of one encoder have in common.

    dropout: of each residual branch; attention_dropout: of attention weights; activation_dropout:
    behind the activation of a feed-forward. gated: every attention gates the shared relative bias
    (WavLM). layer_scale > 0: a learned gain per channel on each residual branch, with this first
    value (data2vec vision). norms_for: modalities with LayerNorms of their own.
    """

    width: int
    hidden: int
    heads: int
    head_size: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    norms_for: tuple[str, ...] = ()
    post_norm: bool = False
    eps: float = 1e-6
    init: str = "xavier"
    gated: bool = False
    layer_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise UserError(
                f"transformer.init: {self.init!r} is not known; use one of {', '.join(INITS)}"
            )

    def norm(self) -> PerModality:
        """A LayerNorm over the width, per modality where asked for."""
        return PerModality(self.norms_for, nn.LayerNorm, self.width, eps=self.eps)

    def branch_dropout(self) -> Dropout:
        """The dropout of a residual branch."""
        return Dropout(self.dropout)


class PerModality(nn.Module):
    """One copy of a part per modality, or a single shared copy when `names` is empty."""

    def __init__(
        self, names: Sequence[str], make: Callable[..., nn.Module], *args: object, **kwargs: object
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: make(*args, **kwargs) for name in names or ("shared",)})
        self.split = bool(names)

    def forward(self, x_BND: Tensor, modality: str | None = None) -> Tensor:
        """Apply the copy of `modality`; a shared copy ignores it.

        Raises:
            UserError: a modality without a copy of its own.
        """
        name = modality if self.split else "shared"
        if name is None or name not in self.parts:
            raise UserError(
                f"transformer: modality {modality!r} has no weights of its own; "
                f"there are {', '.join(self.parts)}"
            )
        out: Tensor = self.parts[name](x_BND)
        return out


class FeedForward(nn.Module):
    """Linear, activation, dropout, Linear."""

    def __init__(
        self, options: LayerOptions, activation: Callable[[Tensor], Tensor] = F.gelu
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = linear(options.width, options.hidden, options.init)
        self.dropout = Dropout(options.activation_dropout)
        self.down = linear(options.hidden, options.width, options.init)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(..., D), same shape out."""
        out: Tensor = self.down(self.dropout(self.activation(self.up(x_BND))))
        return out


def linear(inputs: int, outputs: int, init: str = "xavier", bias: bool = True) -> nn.Linear:
    """Linear layer with zero biases.

    init: `xavier` uniform weights (any width keeps unit scale), or `normal` with deviation 0.02
    (BERT, wav2vec 2.0).
    """
    out = nn.Linear(inputs, outputs, bias)
    if init == "normal":
        nn.init.normal_(out.weight, std=0.02)
    else:
        nn.init.xavier_uniform_(out.weight)
    if bias:
        nn.init.zeros_(out.bias)
    return out
