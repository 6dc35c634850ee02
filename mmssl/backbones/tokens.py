"""Extra tokens in front of a sequence, and DropToken.

P items, N tokens, K kept tokens, G global tokens, R registers, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.types import UserError


class ExtraTokens(nn.Module):
    """Learned tokens put before a sequence: named global tokens (AGG) and registers.

    A pass chooses the global tokens it needs (`use`), e.g. `align` in a contrastive and `masked` in
    a masked pass; registers go into every pass and are thrown away. They get no position (VATT).
    """

    def __init__(self, width: int, names: Sequence[str] = ("agg",), registers: int = 0) -> None:
        super().__init__()
        self.names = tuple(names)
        self.globals_GD: nn.Parameter | None = None  # an empty parameter would have no gradient
        if self.names:
            self.globals_GD = nn.Parameter(torch.randn(len(self.names), width) * 0.02)
        self.registers_RD: nn.Parameter | None = None
        if registers:
            self.registers_RD = nn.Parameter(torch.randn(registers, width) * 0.02)

    def count(self, use: Sequence[str]) -> int:
        """Tokens put before the sequence."""
        return len(use) + (0 if self.registers_RD is None else self.registers_RD.shape[0])

    def forward(
        self, x_PND: Tensor, pad_PN: Tensor | None, use: Sequence[str]
    ) -> tuple[Tensor, Tensor | None]:
        """(P, N, D) to (P, G + R + N, D); the padding mask, if any, grows alike.

        Raises:
            UserError: a name that is not among the tower's global tokens.
        """
        unknown = sorted(set(use) - set(self.names))
        if unknown:
            raise UserError(
                f"global tokens {unknown} are not among {list(self.names)}; name them in the tower"
            )
        front = []
        if self.globals_GD is not None:
            front.append(self.globals_GD[[self.names.index(name) for name in use]])
        if self.registers_RD is not None:
            front.append(self.registers_RD)
        if not front:
            return x_PND, pad_PN
        extra = torch.cat(front).to(x_PND.dtype).expand(x_PND.shape[0], -1, -1)
        pad = None if pad_PN is None else F.pad(pad_PN, (self.count(use), 0), value=False)
        return torch.cat([extra, x_PND], dim=1), pad

    def split(self, x_PMD: Tensor, use: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Outputs (P, G + R + N, D) to ({name: (P, D)}, tokens (P, N, D)), without registers."""
        named = {name: x_PMD[:, i] for i, name in enumerate(use)}
        return named, x_PMD[:, self.count(use) :]


def drop_tokens(
    x_PND: Tensor, uniform_PN: Tensor, drop: float, pad_PN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a uniformly random subset of each row's tokens, in their order (VATT, section 3.3).

    Call it after positions were added, in training only. uniform_PN: one number in [0, 1) per
    token, drawn by the caller per row, so that the choice does not depend on the batch's layout
    (equal rows reproduce the released code's one permutation per batch).

    Returns:
        kept tokens (P, K, D), their indices (P, K) and their padding (P, K), with K = round(N (1 -
        drop)), at least 1. A row with n valid tokens keeps round(n (1 - drop)) of them, at least 1
        if n > 0, first in the row; its remaining places are padding.
    """
    tokens = uniform_PN.shape[1]
    if pad_PN is None:
        pad_PN = torch.zeros_like(uniform_PN, dtype=torch.bool)
    valid_P = (~pad_PN).sum(dim=1)
    keep_P = (valid_P * (1.0 - drop)).round().long().clamp(min=1).minimum(valid_P)
    count = max(1, round(tokens * (1.0 - drop)))
    order_PK = uniform_PN.masked_fill(pad_PN, 2.0).argsort(dim=1, stable=True)[:, :count]
    out_PK = torch.arange(count, device=x_PND.device) >= keep_P[:, None]
    index_PK = (order_PK + out_PK * tokens).sort(dim=1).values % tokens
    kept = x_PND.gather(1, index_PK[..., None].expand(-1, -1, x_PND.shape[-1]))
    return kept, index_PK, out_PK


def visible_tokens(
    x_PND: Tensor, hidden_PN: Tensor, pad_PN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that are neither hidden nor padding, in their order (MAE, He et al. 2022).

    Returns:
        kept tokens (P, K, D), their indices (P, K) and their padding (P, K); K is the largest
        number of visible tokens of a row, at least 1.
    """
    out_PN = hidden_PN if pad_PN is None else hidden_PN | pad_PN
    count = max(1, int((~out_PN).sum(1).max()))
    index_PK = out_PN.to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    kept = x_PND.gather(1, index_PK[..., None].expand(-1, -1, x_PND.shape[-1]))
    return kept, index_PK, out_PN.gather(1, index_PK)


class DropToken(nn.Module):
    """`drop_tokens` in training; in evaluation, or with drop 0, every token stays."""

    def forward(
        self, x_PND: Tensor, uniform_PN: Tensor | None, drop: float, pad_PN: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens, kept indices (None when all are kept) and padding mask.

        Raises:
            UserError: tokens are to be dropped but no random numbers were given.
        """
        if not 0.0 <= drop < 1.0:
            raise UserError(f"drop: {drop} must lie in [0, 1)")
        if not self.training or drop == 0.0:
            return x_PND, None, pad_PN
        if uniform_PN is None:
            raise UserError(
                "DropToken needs one uniform number per token in training; draw them from the "
                "items' seeds"
            )
        return drop_tokens(x_PND, uniform_PN, drop, pad_PN)


class DenseGelu(nn.Module):
    """Linear and GELU: VATT-MA's projections before and after the shared transformer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        out: Tensor = F.gelu(self.linear(x))
        return out
