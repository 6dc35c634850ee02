"""Group normalisation over time that padding does not touch.

P items, C channels, T steps, G groups.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmssl.objectives.precision import wide


class TimeGroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` of (P, C, T) maps whose statistics leave padded steps out.

    One mean and biased variance per item and group of channels, over the valid steps. Without a
    padding mask it is torch's own kernel.
    """

    def forward(self, x_PCT: Tensor, pad_PT: Tensor | None = None) -> Tensor:
        """Same shape out; what stands at padded steps is finite and meaningless.

        pad_PT: True where a step is padding; its content influences nothing.
        """
        if pad_PT is None:
            return super().forward(x_PCT)
        items, channels, steps = x_PCT.shape
        valid_P11T = ~pad_PT[:, None, None, :]
        x_PGCT = wide(x_PCT).reshape(items, self.num_groups, -1, steps)
        count = (valid_P11T.sum(dim=-1, keepdim=True) * x_PGCT.shape[2]).clamp(min=1)
        mean = x_PGCT.masked_fill(~valid_P11T, 0.0).sum(dim=(2, 3), keepdim=True) / count
        centred = (x_PGCT - mean).masked_fill(~valid_P11T, 0.0)
        variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
        out = (centred * (variance + self.eps).rsqrt()).reshape(items, channels, steps)
        normed: Tensor = out * self.weight[:, None] + self.bias[:, None]
        return normed.to(x_PCT.dtype)
