"""`prototypes`: assign views to prototypes, and predict the assignment from another view (SwAV).

Views may be crops of one modality or several modalities. Letters: B rows of this rank, G rows of
all ranks, D width of a projection, K prototypes, Q entries of a queue.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl import dist
from mmssl.banks import Fifo
from mmssl.objectives.assignment import sinkhorn, soft_cross_entropy
from mmssl.objectives.precision import wide
from mmssl.partition import assemble, assign, piece
from mmssl.specs import PrototypesSpec
from mmssl.tasks.base import Task
from mmssl.tasks.siamese import Branch
from mmssl.towers import Passes
from mmssl.types import Batch, Term

Side = tuple[Tensor, Tensor]  # unit vectors (B, D), present (B,)


class Prototypes(Task):
    """Swapped prediction of balanced assignments (Caron et al. 2020).

    prototypes: (K, D), rows of unit length after every step. Assignments are constants, and they
    share all prototypes out among the rows of all ranks and, once it is full, a queue of earlier
    rows of the same view. All ranks compute the same assignments.
    """

    def __init__(self, spec: PrototypesSpec, online: Branch, width: int) -> None:
        super().__init__(spec.weight)
        self.spec, self._online = spec, (online,)  # a tuple hides the towers from this module
        self.projectors = online.projectors
        start_KD = F.normalize(torch.rand(spec.prototypes, width) * 2 - 1, dim=-1)
        self.prototypes = nn.Parameter(start_KD)
        views = spec.assigned if spec.queue else []
        self.queues = nn.ModuleDict({f"of_{v}": Fifo(spec.queue, (width,)) for v in views})

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """{"": cross-entropy of views with the assignments of others}, over rows that have both."""
        sides = {view: self._side(passes, batch, view) for view in self.spec.views}
        self.last = {view: z_BD[there_B].detach() for view, (z_BD, there_B) in sides.items()}
        held = passes.position < self.spec.frozen
        # A gradient of zero, not none: ZeRO waits for one of every parameter.
        table_KD = self.prototypes.detach() + 0 * self.prototypes if held else self.prototypes
        scores = {view: _scores(z_BD, table_KD) for view, (z_BD, _) in sides.items()}
        total, count = table_KD.new_zeros(()), batch.source_B.new_zeros(())
        for view in self.spec.assigned:
            code_BK = self._codes(passes, batch, view, sides[view])
            for other in self.spec.views:
                if other == view:
                    continue
                both_B = sides[view][1] & sides[other][1]
                loss_B = soft_cross_entropy(scores[other], code_BK, self.spec.temperature)
                total, count = total + loss_B.where(both_B, 0.0).sum(), count + both_B.sum()
        return {"": Term(total, count)}

    @torch.no_grad()
    def after_step(self, position: float) -> None:
        """Prototypes of unit length again; the step's vectors enter the queues."""
        if position >= self.spec.frozen:
            whole_KD = assemble(self.prototypes, piece(self.prototypes))
            assign(self.prototypes, F.normalize(whole_KD, dim=-1))
        for queue in self.queues.values():
            queue.write()  # type: ignore[operator]

    def _side(self, passes: Passes, batch: Batch, view: str) -> Side:
        z_BD = wide(self._online[0](passes, view))
        return F.normalize(z_BD, dim=-1, eps=1e-6), batch.views[view].present_B

    @torch.no_grad()
    def _codes(self, passes: Passes, batch: Batch, view: str, side: Side) -> Tensor:
        """(B, K) assignments of this rank's rows."""
        z_GD, valid_G = (dist.gather_no_grad(part) for part in side)
        rows = slice(dist.rank() * batch.size, (dist.rank() + 1) * batch.size)
        queue = self.queues[f"of_{view}"] if self.spec.queue else None
        if isinstance(queue, Fifo):
            if self.training and passes.position >= self.spec.queue_from:
                queue.offer(side[0], batch.source_B, side[1], passes.position)
            full = (queue.filled == self.spec.queue).expand(self.spec.queue)
            z_GD = torch.cat([z_GD, queue.rows_K.to(z_GD.dtype)])
            valid_G = torch.cat([valid_G, full])
        scores_GK = _scores(z_GD, self.prototypes)
        return sinkhorn(scores_GK, self.spec.epsilon, self.spec.iterations, valid_G)[rows]


def _scores(z_BD: Tensor, table_KD: Tensor) -> Tensor:
    """(B, K) dot products, in fp32 at least: an assignment is a function of 20 times the score."""
    with torch.autocast(z_BD.device.type, enabled=False):
        return z_BD @ table_KD.to(z_BD.dtype).T
