"""`siamese`: two views of a row that predict each other, or correlate, over the rows of a batch.

Hosts BYOL(-A), SimSiam, MoCo v2 and Barlow Twins; with views of two modalities the same methods
relate sound, pictures and text. Letters: B rows of this rank, D width of a projection, K entries of
a queue.

Each view is encoded, pooled and projected by the online network; a predictor, where there is one,
says what the target network makes of the other view. That is the online network itself behind a
stop-gradient, or its moving average, which is never trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.banks import Fifo
from mmssl.dist import MaskedSyncBatchNorm
from mmssl.heads.embed import pool
from mmssl.heads.mlp import MLP
from mmssl.objectives.precision import wide
from mmssl.objectives.siamese import cross_correlation, negative_cosine, queue_nce, redundancy
from mmssl.specs import CrossCorrelationSpec, QueueSpec, SiameseSpec
from mmssl.targets.teacher import Teacher
from mmssl.tasks.base import Task
from mmssl.towers import AnyTower, Passes, Tower, spread
from mmssl.types import Batch, Term


class Branch(nn.Module):
    """Towers, by name, with their projectors and a trunk they may share."""

    def __init__(
        self,
        towers: Mapping[str, AnyTower],
        projectors: Mapping[str, MLP],
        pools: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.pools = dict(pools)
        self.towers, self.projectors = nn.ModuleDict(towers), nn.ModuleDict(projectors)
        shared = [t.trunk for t in towers.values() if isinstance(t, Tower) and t.own_trunk is None]
        self.trunk = shared[0] if shared else None  # hidden in the towers, yet part of the copy

    def forward(self, passes: Passes, view: str) -> Tensor:
        """(B, D) projections of a view; rows without it hold nothing of meaning."""
        tower, tokens = passes.tower_of[view], passes.tokens(view)
        pooled_BD = spread(pool(tokens, self.pools[tower]), tokens.view)[:, 0]
        out: Tensor = self.projectors[tower](pooled_BD, tokens.view.present_B)
        return out

    def passes(self, online: Passes) -> Passes:
        """The passes of this branch's own towers over the batch of others."""
        towers: Mapping[str, AnyTower] = dict(self.towers.items())  # type: ignore[arg-type]
        where = (online.tower_of, online.batch, online.position, online.chunk)
        return Passes(towers, {}, *where)


class Siamese(Task):
    """One term over the rows that have both views.

    online: is read, its towers belong to the model. predictors: by tower, none without. space: of
    the vectors in which two modalities are compared; None where both views are of one.
    """

    def __init__(
        self,
        spec: SiameseSpec,
        online: Branch,
        predictors: Mapping[str, MLP],
        space: str | None = None,
    ) -> None:
        super().__init__(spec.weight)
        self.spec, self.queries, self.space = spec, spec.queries, space
        self._online = (online,)  # a tuple hides the towers from this module's parameters
        self.projectors, self.predictors = online.projectors, nn.ModuleDict(predictors)
        self.teacher = None if spec.decay is None else Teacher(online, spec.decay, follows=True)
        # Statistics by which single clips are standardised: the loss has those of its batch.
        crossed = space is not None and isinstance(spec.objective, CrossCorrelationSpec)
        self.norms = nn.ModuleDict(
            {
                tower: MaskedSyncBatchNorm(spec.projector.widths[-1], affine=False)
                for tower in (online.towers if crossed else ())
            }
        )
        sizes = [spec.objective.size] if isinstance(spec.objective, QueueSpec) else []
        self.queues = nn.ModuleDict(
            {f"of_{view}": _queue(size, spec) for view in self.queries for size in sizes}
        )

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """{"": the objective}, summed over the rows that have both views."""
        first, second = self.spec.between
        both_B = batch.views[first].present_B & batch.views[second].present_B
        read = self.spec.between if self.teacher is None else self.queries
        online = {view: self._online[0](passes, view) for view in read}
        self.last = {view: z_BD[both_B].detach() for view, z_BD in online.items()}
        objective = self.spec.objective
        if isinstance(objective, CrossCorrelationSpec):
            for view in read if self.norms and self.training else ():
                self.norms[passes.tower_of[view]](online[view].detach(), both_B)
            c_DD = cross_correlation(online[first], online[second], both_B)
            loss_B = redundancy(c_DD, objective.off_diagonal).expand(len(both_B))
        else:
            targets = self._targets(passes, online)
            loss_B = torch.stack(
                [
                    self._regress(passes, batch, view, online[view], targets[view], both_B)
                    for view in self.queries
                ]
            ).mean(0)
        if objective.kind == "byol":
            loss_B = 4 + 4 * loss_B  # the sum of both squared distances, each 2 - 2 cos
        return {"": Term(loss_B.where(both_B, 0.0).sum(), both_B.sum())}

    def after_step(self, position: float) -> None:
        """Let the teacher follow, and take the step's keys into the queues."""
        if self.teacher is not None:
            self.teacher.update(position)
        for queue in self.queues.values():
            queue.write()  # type: ignore[operator]

    def vector_pairs(self) -> list[tuple[tuple[str, str], str]]:
        """The two views, if they are of two modalities."""
        return [] if self.space is None else [(self.spec.between, self.space)]

    def vectors(self, passes: Passes) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """Those whose cosine is what the objective raises, the mean over both directions.

        A view's vector holds its prediction beside its target, each of unit length; that of the
        second view the other way round. Behind `cross_correlation` it is the projection in
        standard units.
        """
        out: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        for view, space in self.space_keys():
            if view not in passes.batch.views:
                continue
            there_B, tower = passes.batch.views[view].present_B, passes.tower_of[view]
            z_BD = self._online[0](passes, view)
            if self.norms:
                parts = [self.norms[tower](z_BD, there_B)]
            else:
                asks_BD = self.predictors[tower](z_BD, there_B) if self.predictors else z_BD
                parts = [asks_BD, self._target(passes, view, z_BD)]
            parts = parts if view == self.spec.between[0] else parts[::-1]
            vector_BS = torch.cat([F.normalize(part, dim=-1) for part in parts], -1)
            out[view, space] = vector_BS[:, None], there_B[:, None]
        return out

    def _targets(self, passes: Passes, online: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{query view: (B, D) the constant it is asked for, of the other view}."""
        other = dict(zip(self.spec.between, reversed(self.spec.between), strict=True))
        asked = {view: other[view] for view in self.queries}
        return {q: self._target(passes, view, online.get(view)) for q, view in asked.items()}

    @torch.no_grad()
    def _target(self, passes: Passes, view: str, z_BD: Tensor | None) -> Tensor:
        """(B, D) what the other view is asked for; z_BD: this one's projection."""
        if self.teacher is None:
            assert z_BD is not None  # without a teacher all views are read
            return z_BD.detach()
        twin = self.teacher.twin
        target_BD: Tensor = twin(twin.passes(passes), view)  # type: ignore[operator]
        return target_BD

    def _regress(
        self,
        passes: Passes,
        batch: Batch,
        view: str,
        z_BD: Tensor,
        target_BD: Tensor,
        both_B: Tensor,
    ) -> Tensor:
        """(B,) loss of one direction."""
        if self.predictors:
            z_BD = self.predictors[passes.tower_of[view]](z_BD, both_B)
        objective = self.spec.objective
        if not isinstance(objective, QueueSpec):
            return negative_cosine(z_BD, target_BD)
        queue = self.queues[f"of_{view}"]
        assert isinstance(queue, Fifo)
        # Entries of a row's own recording are no negatives of it.
        valid_BK = batch.source_B[:, None] != queue.source_K
        loss_B = queue_nce(z_BD, target_BD, queue.rows_K, objective.temperature, valid_BK)
        if self.training:
            keys_BD = F.normalize(wide(target_BD), dim=-1)
            queue.offer(keys_BD, batch.source_B, both_B, passes.position)
        return loss_B


def _queue(size: int, spec: SiameseSpec) -> Fifo:
    """Random unit vectors to begin with, as many negatives as later on."""
    queue = Fifo(size, (spec.projector.widths[-1],))
    queue.rows_K.copy_(F.normalize(torch.randn_like(queue.rows_K), dim=-1))
    return queue
