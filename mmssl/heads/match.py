"""What `Match` asks: the log-odds that two views belong together.

Letters: B rows, R scored pairs, D width of a vector, S of a space, T time steps.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmssl.heads.dense import MapScore
from mmssl.heads.embed import Embedder, pool
from mmssl.heads.mlp import mlp
from mmssl.heads.score import Distance, FusionMLP
from mmssl.objectives.contrastive import LogitScale
from mmssl.towers import Passes, item_weight, spread, time_steps

Parts = tuple[Tensor, ...]


class PooledReader(nn.Module):
    """Reads a view as one vector, through an MLP if `embed` has widths."""

    def __init__(
        self, views: tuple[str, str], widths: dict[str, int], how: str, embed: list[int]
    ) -> None:
        super().__init__()
        self.how = how
        self.mlps = nn.ModuleDict({view: mlp(widths[view], embed) for view in views})

    def forward(self, passes: Passes, view: str, like: str) -> Parts:
        """((B, D),) vectors of a view by the MLP of `like`."""
        tokens = passes.tokens(view)
        return (spread(self.mlps[like](pool(tokens, self.how)), tokens.view)[:, 0],)


class SpaceReader(nn.Module):
    """Reads a view as its vector in a space of a `pairs` task, which owns the weights."""

    def __init__(self, embedder: Embedder, space: str) -> None:
        super().__init__()
        self._embedder = (embedder,)  # a tuple hides the weights from this module's parameters
        self.space = space

    def forward(self, passes: Passes, view: str, like: str) -> Parts:
        """((B, S),) vectors of a view, the same that the pairs are scored with."""
        return (self._embedder[0](passes, view, [self.space])[0][self.space][:, 0],)


class VectorMatch(nn.Module):
    """Match logit of two vectors."""

    def __init__(self, reader: PooledReader | SpaceReader, score: FusionMLP | Distance) -> None:
        super().__init__()
        self.reader, self.score = reader, score

    def read(self, passes: Passes, view: str, like: str) -> Parts:
        """Row-first tensors of a view."""
        parts: Parts = self.reader(passes, view, like)
        return parts

    def forward(self, passes: Passes, a: Parts, b: Parts) -> Tensor:
        """(R,) log-odds of a match."""
        return self.score.pairs(a[0], b[0])


class MapMatch(nn.Module):
    """Match logit of a map score (AVOL-Net): some cell answers to the sound, or none does."""

    def __init__(self, score: MapScore, scale: LogitScale) -> None:
        super().__init__()
        self.score, self.scale = score, scale

    def read(self, passes: Passes, view: str, like: str) -> Parts:
        """Projected cells or steps of a view and which of them are valid."""
        return self.score.embed(passes, view)[0]

    def forward(self, passes: Passes, a: Parts, b: Parts) -> Tensor:
        """(R,) log-odds of a match."""
        logits: Tensor = self.scale(self.score.pairs(a, b))
        return logits


class JointMatch(nn.Module):
    """Match logit read from a joint tower over both views' time steps."""

    def __init__(self, tower: str, views: tuple[str, str], width: int, reduce: str) -> None:
        super().__init__()
        self.tower, self.views, self.reduce = tower, views, reduce
        self.out = nn.Linear(width, 1)

    def read(self, passes: Passes, view: str, like: str) -> Parts:
        """Tokens (B, T, D) of a view and which of them hold something."""
        tokens = passes.tokens(view)
        x, pad = time_steps(tokens, self.reduce)
        kept = (~pad).to(x.dtype) * item_weight(tokens.view).to(x.dtype)[:, None]
        return spread(x, tokens.view)[:, 0], spread(kept, tokens.view)[:, 0]

    def forward(self, passes: Passes, a: Parts, b: Parts) -> Tensor:
        """(R,) log-odds of a match."""
        parts = {name: (x, kept <= 0) for name, (x, kept) in zip(self.views, (a, b), strict=True)}
        named = passes.joints[self.tower](parts)
        logits: Tensor = self.out(next(iter(named.values())))
        return logits[:, 0]


MatchScore = VectorMatch | MapMatch | JointMatch
