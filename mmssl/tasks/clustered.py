"""`classify`, labels that come from clustering: DeepCluster.

Letters: B rows of this rank, N clips of the training data, D width of a feature, K clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mmssl import dist
from mmssl.data.sidecars import Source
from mmssl.heads.embed import pool
from mmssl.heads.mlp import mlp
from mmssl.objectives.classification import correct, softmax_cross_entropy
from mmssl.partition import assign
from mmssl.rng import generator, seed_of
from mmssl.specs import ClusterSpec, Number
from mmssl.targets.clusters import fit, whitened
from mmssl.tasks.base import Task
from mmssl.towers import Passes, spread
from mmssl.types import Batch, Term, UserError

_STD = 0.01  # of a new top layer


class Clustered(Task):
    """Cross-entropy with the clusters of an epoch's features (Caron et al. 2018).

    During an epoch the features of every clip are kept as they come by. At its end, when as many
    rows were read as there are clips, whether they have the view or not, features are whitened,
    normalised and clustered anew, and the top layer starts again, for labels of two epochs have
    nothing to do with each other. The first epoch has no labels: it keeps features of the untrained
    network. Rows weigh the inverse of their cluster's size, as if clusters were drawn uniformly.

    Features are those that the last hidden layer of `embed` gives before its ReLU, or the pooled
    ones. Buffers: features_ND, known_N, labels_N (-1: none), seen (1,) rows of this epoch, epoch
    (1,); on every rank the same.
    """

    features_ND: Tensor
    known_N: Tensor
    labels_N: Tensor
    seen: Tensor
    epoch: Tensor

    def __init__(
        self,
        name: str,
        spec: ClusterSpec,
        width: int,
        how: str,
        embed: list[int],
        weight: Number,
        seed: int,
    ) -> None:
        super().__init__(weight)
        self.name, self.spec, self.pool, self.seed = name, spec, how, seed
        self.head = mlp(width, embed)
        self.activation = nn.ReLU() if embed else nn.Identity()
        width = embed[-1] if embed else width
        self.out = nn.Linear(width, spec.clusters)
        nn.init.normal_(self.out.weight, std=_STD)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("features_ND", torch.zeros(spec.clips, width))
        self.register_buffer("known_N", torch.zeros(spec.clips, dtype=torch.bool))
        self.register_buffer("labels_N", torch.full((spec.clips,), -1))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("epoch", torch.zeros(1, dtype=torch.int64))
        self._read: list[tuple[Tensor, Tensor, int]] = []
        self._position = -1.0

    @property
    def resting(self) -> bool:  # type: ignore[override]
        """In the first epoch, whose clips have no labels."""
        return not int(self.epoch)

    def weight(self, term: str) -> list[Number]:
        """The task's weight; 0 of what is watched."""
        return [self._weight] if not term else [0.0]

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """Cross-entropy over the rows that have a label, and how often the likeliest is right.

        Raises:
            UserError: the data has more clips than `clips`.
        """
        tokens = passes.tokens(self.spec.view)
        features_BD = spread(self.head(pool(tokens, self.pool)), tokens.view)[:, 0]
        logits_BK = self.out(self.activation(features_BD))
        there_B = tokens.view.present_B
        if self.training:
            self._keep(features_BD, batch.index_B, there_B, passes.position)
            label_B = self.labels_N[batch.index_B.where(there_B, 0)]
        else:  # of other data, whose clips have other numbers
            label_B = torch.full_like(batch.index_B, -1)
        valid_B = there_B & (label_B >= 0)
        weight_B = self._weights()[label_B.clamp(min=0)].where(valid_B, 0.0)
        loss_B = softmax_cross_entropy(logits_BK, label_B, valid_B)
        return {
            "": Term((weight_B * loss_B).sum(), weight_B.sum()),
            "accuracy": Term(*correct(logits_BK, label_B, valid_B)),
        }

    @torch.no_grad()
    def after_step(self, position: float) -> None:
        """Keep the step's features, and cluster at the end of an epoch; a collective then."""
        for features, index, rows in self._read:
            finite = features.isfinite().all(1)
            features, index = _last(features[finite], index[finite])
            self.features_ND[index], self.known_N[index] = features, True
            self.seen += rows
        self._read = []
        if int(self.seen) >= self.spec.clips:
            self._relabel()

    @torch.no_grad()
    def _keep(self, features_BD: Tensor, index_B: Tensor, there_B: Tensor, position: float) -> None:
        if position != self._position:  # what a step that was left out has read is forgotten
            self._read, self._position = [], position
        parts = (features_BD.to(self.features_ND.dtype), index_B, there_B)
        features, index, there = (dist.gather_no_grad(x) for x in parts)
        highest = int(index.where(there, 0).max())
        if highest >= self.spec.clips:
            raise UserError(
                f"tasks.{self.name}.target.clips: {self.spec.clips}, but the data has a clip of "
                f"number {highest}, its row in the manifest from 0; give at least {highest + 1}"
            )
        self._read.append((features[there], index[there], len(there)))

    def _weights(self) -> Tensor:
        """(K,) weight of a row by its cluster: 1 on average over the labelled clips."""
        count_K = self.labels_N[self.labels_N >= 0].bincount(minlength=self.spec.clusters)
        used = (count_K > 0).sum()
        return count_K.sum() / (used * count_K).clamp(min=1).float()

    def _relabel(self) -> None:
        epoch = int(self.epoch) + 1
        known = self.known_N.nonzero()[:, 0]
        labels = dist.on_rank0(lambda: self._clusters(self.features_ND[known], epoch))
        self.labels_N[known] = torch.from_numpy(labels).to(self.labels_N)
        for parameter, value in zip(self.out.parameters(), self._fresh(epoch), strict=True):
            assign(parameter, value.to(parameter.device))
        self.seen.zero_()
        self.epoch.fill_(epoch)

    def _clusters(self, features_ND: Tensor, epoch: int) -> np.ndarray:
        """(N,) cluster of each feature."""
        spec = self.spec
        x_ND = whitened(features_ND.cpu().numpy(), spec.components)
        seed = seed_of(self.seed, self.name, "clusters", epoch)
        try:
            found = fit(
                lambda: iter([x_ND.copy()]),
                spec.clusters,
                Source(self.name, 1.0),
                sweeps=spec.sweeps,
                restarts=1,
                seed=seed,
            )
        except UserError as error:
            raise UserError(f"tasks.{self.name}.target.clusters: {error}") from error
        return found.assign(x_ND)

    def _fresh(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the top layer of an epoch."""
        draws = generator(self.seed, self.name, "top", epoch)
        width, clusters = self.out.in_features, self.out.out_features
        weight = _STD * torch.randn(clusters, width, generator=draws)
        return weight, torch.zeros(clusters)


def _last(features_BD: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor]:
    """The last row of every clip: of several, devices would keep any."""
    order_B = index_B.argsort(stable=True)
    sorted_B = index_B[order_B]
    ends_B = torch.ones_like(sorted_B, dtype=torch.bool)
    ends_B[:-1] = sorted_B[1:] != sorted_B[:-1]
    return features_BD[order_B[ends_B]], sorted_B[ends_B]
