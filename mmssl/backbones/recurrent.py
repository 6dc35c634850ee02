"""Recurrent trunks: the context networks of APC, CPC and CPC2.

B rows, N tokens, E width of what enters, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmssl.backbones.dropout import Dropout
from mmssl.objectives.precision import recurrent

CELLS: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}


class Recurrent(nn.Module):
    """Layers of GRU or LSTM cells, which see the past alone.

    width_in: E, which need not be D: there is no map in front of the first layer. residual: a layer
    of equal widths adds what enters it (APC, Chung et al. 2019). dropout: between layers.
    """

    causal = True

    def __init__(
        self,
        width: int,
        width_in: int,
        layers: int = 1,
        cell: str = "gru",
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width, self.width_in, self.layers, self.residual = width, width_in, layers, residual
        self.blocks = nn.ModuleList(
            CELLS[cell](width_in if i == 0 else width, width, batch_first=True)
            for i in range(layers)
        )
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x_BND: Tensor,
        pad_BN: Tensor | None = None,
        modality: str | None = None,
        return_hidden: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, N, E) to (B, N, D) and, if asked, the output of every layer.

        pad_BN: True at padding, which must stand behind the tokens; its output means nothing.
        """
        if pad_BN is not None:
            x_BND = x_BND.masked_fill(pad_BN[..., None], 0.0)
        hidden: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            new_BND = recurrent(block, x_BND)
            if i + 1 < self.layers:
                new_BND = self.dropout(new_BND)
            add = self.residual and new_BND.shape == x_BND.shape
            x_BND = x_BND + new_BND if add else new_BND
            if return_hidden:
                hidden.append(x_BND)
        return x_BND, hidden
