"""The shared encoder: one transformer that every modality may run through.

B rows, N tokens, D width, H heads, E head size. Pre-norm by default (VATT): x + attention(norm(x)),
then x + mlp(norm(x)), with a final norm. Weights may be kept per modality: all LayerNorms
(`norms_for`) and the feed-forward of the first layers (`ffn_for`, `ffn_layers`); attention is
always shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmssl.backbones.relative import RelativeBias
from mmssl.types import UserError


class PerModality(nn.Module):
    """One copy of a part per modality, or a single shared copy when `names` is empty."""

    def __init__(
        self, names: Sequence[str], make: type[nn.Module], *args: object, **kwargs: object
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
    """Linear, GELU, dropout, Linear."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = _linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.down = _linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(..., D), same shape out."""
        out: Tensor = self.down(self.dropout(F.gelu(self.up(x_BND))))
        return out


class Attention(nn.Module):
    """Multi-head self-attention with biases, on torch's fused kernel."""

    def __init__(self, width: int, heads: int, head_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head_size, self.dropout = heads, head_size, dropout
        self.qkv = _linear(width, 3 * heads * head_size)
        self.out = _linear(heads * head_size, width)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: None, bool (True = may look) or additive; broadcastable to (B, H, N, N)."""
        rows, tokens, _ = x_BND.shape
        qkv = self.qkv(x_BND).view(rows, tokens, 3, self.heads, self.head_size)
        q_BHNE, k_BHNE, v_BHNE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(
            q_BHNE, k_BHNE, v_BHNE, mask, dropout_p=self.dropout if self.training else 0.0
        )
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, tokens, -1))
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward, each with its norm, residual and dropout."""

    def __init__(
        self,
        width: int,
        hidden: int,
        heads: int,
        head_size: int,
        dropout: float,
        norms_for: Sequence[str],
        ffn_for: Sequence[str],
        post_norm: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = PerModality(norms_for, nn.LayerNorm, width, eps=eps)
        self.attention = Attention(width, heads, head_size, dropout)
        self.norm2 = PerModality(norms_for, nn.LayerNorm, width, eps=eps)
        self.ffn = PerModality(ffn_for, FeedForward, width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BND: Tensor, mask: Tensor | None = None, modality: str | None = None
    ) -> Tensor:
        """(B, N, D), same shape out; mask as in `Attention`."""
        if self.post_norm:
            x_BND = self.norm1(x_BND + self.dropout(self.attention(x_BND, mask)), modality)
            out: Tensor = self.norm2(x_BND + self.dropout(self.ffn(x_BND, modality)), modality)
            return out
        x_BND = x_BND + self.dropout(self.attention(self.norm1(x_BND, modality), mask))
        out = x_BND + self.dropout(self.ffn(self.norm2(x_BND, modality), modality))
        return out


class Transformer(nn.Module):
    """Encoder of (B, N, D) tokens.

    heads x head_size need not equal the width; heads 0 means width / head_size. hidden 0 means 4 x
    width. norms_for, ffn_for: modalities with LayerNorms / feed-forwards of their own (empty =
    shared), the latter in the first `ffn_layers` layers. relative_buckets > 0 adds T5's learned
    relative bias to the first layer. checkpointing recomputes each layer in the backward pass:
    memory of one layer instead of all.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int = 0,
        head_size: int = 64,
        hidden: int = 0,
        dropout: float = 0.0,
        norms_for: Sequence[str] = (),
        ffn_for: Sequence[str] = (),
        ffn_layers: int = 0,
        post_norm: bool = False,
        relative_buckets: int = 0,
        relative_distance: int = 64,
        checkpointing: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        heads = heads or width // head_size
        if heads < 1 or layers < 1:
            raise UserError(
                f"transformer: width {width}, head_size {head_size}, {heads} heads, {layers} "
                "layers: need at least one layer and one head; lower head_size or give heads"
            )
        if bool(ffn_for) != (ffn_layers > 0) or ffn_layers > layers:
            raise UserError(
                f"transformer: ffn_layers {ffn_layers} of {layers} layers with ffn_for "
                f"{list(ffn_for)}; give both, and no more than there are layers"
            )
        self.width, self.checkpointing = width, checkpointing
        self.relative: RelativeBias | None = None
        if relative_buckets:
            self.relative = RelativeBias(heads, relative_buckets, relative_distance)
        own = [tuple(ffn_for) if i < ffn_layers else () for i in range(layers)]
        self.blocks = nn.ModuleList(
            Block(
                width, hidden or 4 * width, heads, head_size, dropout, norms_for, o, post_norm, eps
            )
            for o in own
        )
        # the last norm of a post-norm stack is already inside its last layer
        self.norm: nn.Module | None = None
        if not post_norm:
            self.norm = PerModality(norms_for, nn.LayerNorm, width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BND: Tensor,
        pad_BN: Tensor | None = None,
        modality: str | None = None,
        return_hidden: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode; returns the normed output (B, N, D) and, if asked, every layer's raw output.

        pad_BN: True where a token must be ignored. Its content influences nothing; its output is
        finite and meaningless. hidden[i] is the output of layer i before the final norm; empty
        unless `return_hidden`.
        """
        if pad_BN is not None:
            # a non-finite padded value would reach others through 0 * nan
            x_BND = x_BND.masked_fill(pad_BN[..., None], 0.0)
        look = None if pad_BN is None else _look(pad_BN)
        hidden: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            mask = self._biased(look, x_BND) if i == 0 else look
            if self.checkpointing and self.training:
                x_BND = checkpoint(block, x_BND, mask, modality, use_reentrant=False)
            else:
                x_BND = block(x_BND, mask, modality)
            if return_hidden:
                hidden.append(x_BND)
        if self.norm is not None:
            x_BND = self.norm(x_BND, modality)
        return self.dropout(x_BND), hidden

    def _biased(self, look: Tensor | None, x_BND: Tensor) -> Tensor | None:
        """Mask of the first layer, which alone carries the relative positions."""
        if self.relative is None:
            return look
        bias: Tensor = self.relative(x_BND.shape[1]).to(x_BND.dtype)
        return bias if look is None else bias.masked_fill(~look, float("-inf"))


def _look(pad_BN: Tensor) -> Tensor:
    """(B, 1, 1, N) keys that may be looked at."""
    # a row of nothing but padding looks at itself: an empty softmax is nan
    return ~(pad_BN & ~pad_BN.all(dim=1, keepdim=True))[:, None, None, :]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Linear layer with Xavier-uniform weights and zero biases (any width keeps unit scale)."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
