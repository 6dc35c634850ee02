"""Multi-head self-attention, with a relative bias that may be gated.

B rows, N tokens, D width, H heads, E head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.backbones.dropout import Dropout
from mmssl.backbones.layers import LayerOptions, linear
from mmssl.backbones.relative import RelativeGate


class Attention(nn.Module):
    """Multi-head self-attention with biases, on torch's fused kernel."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.heads, self.head_size = options.heads, options.head_size
        inner = self.heads * self.head_size
        self.qkv = linear(options.width, 3 * inner, options.init)
        self.out = linear(inner, options.width, options.init)
        self.dropout = Dropout(options.attention_dropout)
        self.gate: RelativeGate | None = None
        if options.gated:
            self.gate = RelativeGate(options.width, self.heads, options.init)

    def forward(
        self, x_BND: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x_BND: tokens, normed or not: what the layer lets attention see.
            mask: None, bool (True = may look) or additive; broadcastable to (B, H, N, N).
            bias: additive, broadcastable alike; a gated layer multiplies it by its gate.
        """
        rows, tokens, _ = x_BND.shape
        qkv = self.qkv(x_BND).view(rows, tokens, 3, self.heads, self.head_size)
        q_BHNE, k_BHNE, v_BHNE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if bias is not None and self.gate is not None:
            bias = self.gate(x_BND) * bias
        mixed = self._mix(q_BHNE, k_BHNE, v_BHNE, _joined(mask, bias))
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, tokens, -1))
        return out

    def _mix(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, mask: Tensor | None) -> Tensor:
        rate = self.dropout.rate if self.training else 0.0
        if rate == 0.0 or q_BHNE.device.type != "cpu":
            return F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, mask, dropout_p=rate)
        # with dropout torch has no fused kernel for a CPU either, only slower random numbers
        scores = (q_BHNE * self.head_size**-0.5) @ k_BHNE.transpose(-2, -1)
        weights: Tensor = self.dropout(_masked(scores, mask).softmax(dim=-1).to(v_BHNE.dtype))
        return weights @ v_BHNE


def key_mask(pad_BN: Tensor) -> Tensor:
    """(B, 1, 1, N) bool: keys that may be looked at."""
    # a row of nothing but padding looks at itself: an empty softmax is nan
    return ~(pad_BN & ~pad_BN.all(dim=1, keepdim=True))[:, None, None, :]


def past_mask(tokens: int, device: torch.device) -> Tensor:
    """(N, N) bool: what each token may look at where none may see a later one."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def _joined(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return mask if bias is None else _masked(bias, mask)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask
