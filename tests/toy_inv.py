"""Ten classes of rows whose views share 16 of 64 numbers; louder noise fills the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from small_methods import make_tokens
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.types import Batch, Tokens, ViewBatch

ROWS, WIDTH, HIDDEN = 2000, 64, 128


class ToyInv:
    """The set of one seed. R rows, B of a batch.

    A random encoder finds 44 % of the classes by neighbours.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = g = torch.Generator().manual_seed(seed)
        centroids = torch.randn(10, 16, generator=g)
        self.labels_R = torch.randint(10, (ROWS,), generator=g)
        self.rows = centroids[self.labels_R] + 0.5 * torch.randn(ROWS, 16, generator=g)
        self.rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g))[0]

    def views(self, rows: Tensor) -> list[Tensor]:
        """Two (B, 64) views of rows (B, 16)."""
        out = []
        for _ in range(2):
            noise = torch.randn(len(rows), 16, generator=self.generator)
            rest = 2 * torch.randn(len(rows), 48, generator=self.generator)
            out.append(torch.cat([rows + 0.1 * noise, rest], 1) @ self.rotation)
        return out

    def batch(self, size: int) -> tuple[Tensor, list[Tensor]]:
        """(B,) numbers of random rows and their two views."""
        picked_B = torch.randint(ROWS, (size,), generator=self.generator)
        return picked_B, self.views(self.rows[picked_B])

    @torch.no_grad()
    def score(self, encode: Callable[[Tensor], Tensor]) -> float:
        """Share of the second half whose 20 nearest of the first half have its label."""
        views, half = self.views(self.rows), ROWS // 2
        known, asked = encode(views[0][:half]), encode(views[1][half:])
        near = (F.normalize(asked, dim=-1) @ F.normalize(known, dim=-1).T).topk(20).indices
        found = self.labels_R[:half][near].mode(1).values
        return float((found == self.labels_R[half:]).float().mean())


class Encoder(nn.Module):
    """Stands in for a tower: one token per item."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()),
            *(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()),
        )

    def encode(self, view: ViewBatch, position: float, mask: None = None) -> Tokens:
        """The vectors of a view."""
        return make_tokens(self.net(view.data)[:, None], (1,), view=view)


def batch_of(picked: Tensor, views: list[Tensor]) -> Batch:
    """What `ToyInv.batch` gives as views `a` and `b` of sources."""
    rows = torch.arange(len(picked))
    zeros, here = torch.zeros_like(rows), torch.ones(len(rows), 1, dtype=torch.bool)
    named = {
        name: ViewBatch("audio", x, zeros + WIDTH, rows, zeros, rows, zeros.float(), here, 1.0)
        for name, x in zip("ab", views, strict=True)
    }
    return Batch(named, [""] * len(rows), picked, zeros, rows)
