"""`separate`: sounds are mixed, and a tower with masks on its latents takes the mixture apart.

P items, K sounds of a mixture, C = K - 1 of them beside the item's own, M outputs, S samples, V
views (heard, clean), G rows of all ranks, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl import dist
from mmssl.frontends.lengths import Field
from mmssl.frontends.patches import zero_behind
from mmssl.frontends.wave_stem import WaveStem
from mmssl.heads.separate import MaskHead
from mmssl.objectives.negatives import companions
from mmssl.objectives.precision import wide
from mmssl.objectives.separation import (
    best_permutation,
    best_remix,
    noise_to_signal,
    remixed,
    si_sdr,
)
from mmssl.rng import row_uniform
from mmssl.specs import Number, SeparateSpec
from mmssl.tasks.base import Task, row_seeds
from mmssl.towers import Passes, item_weight
from mmssl.types import Batch, Term, ViewBatch
from mmssl.views.mix import levelled


@dataclass(frozen=True)
class Mixtures:
    """Mixtures of a batch and what they were made of.

    heard: the view that plays them. sound_PKS: what was mixed, clean, at its level in the mixture.
    valid_P: items of which there are, with enough other sources.
    """

    heard: ViewBatch
    sound_PKS: Tensor
    valid_P: Tensor

    def of(self, kept_P: Tensor) -> Mixtures:
        """Some of them."""
        columns: dict[str, Any] = {
            name: column[kept_P] for name, column in self.heard.columns().items()
        }
        heard = replace(self.heard, **columns, labels={})
        return Mixtures(heard, self.sound_PKS[kept_P], self.valid_P[kept_P])


class Separate(Task):
    """Every item is mixed with others of the batch and taken apart again.

    The others are rows of other sources, of whatever rank, drawn by the item's seed: the mixtures
    do not depend on how many processes share the batch. All begin together. The objective compares
    the outputs with the sounds themselves (`permutation`) or with two mixtures of them (`remix`).

    samples: of a whole view.
    """

    def __init__(
        self, name: str, spec: SeparateSpec, head: MaskHead, samples: int, weight: Number
    ) -> None:
        super().__init__(weight)
        self.name, self.spec, self.head, self.samples = name, spec, head, samples

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """The loss in dB: of every audible sound, or of every one of the two mixtures."""
        with torch.no_grad():
            mixed = self.mixtures(batch, self.spec.sounds, self.spec.db, self.spec.clean)
        output_PMS = self.separate(passes, mixed.heard)
        objective = self.spec.objective
        if objective.kind == "permutation":
            return {"": self._permuted(output_PMS, mixed)}
        pair_P2S = torch.stack([part.sum(1) for part in mixed.sound_PKS.chunk(2, 1)], 1)
        place_PM = best_remix(output_PMS, pair_P2S, objective.limit_db)
        remix_P2S = remixed(output_PMS, place_PM, 2)
        loss_P2 = noise_to_signal(remix_P2S, pair_P2S, objective.limit_db)
        valid_P = mixed.valid_P & pair_P2S.any(-1).all(-1)
        return {"": Term(loss_P2[valid_P].sum(), 2 * valid_P.sum())}

    def _permuted(self, output_PMS: Tensor, mixed: Mixtures) -> Term:
        lengths_P11 = mixed.heard.lengths_P[:, None, None]
        sound_P1KS = mixed.sound_PKS[:, None]
        audible_PK = mixed.sound_PKS.any(-1) & mixed.valid_P[:, None]
        cost_PMK = -si_sdr(output_PMS[:, :, None], sound_P1KS, lengths_P11)
        index_PK = best_permutation(cost_PMK, audible_PK)
        loss_PK = cost_PMK.gather(1, index_PK[:, None])[:, 0]
        return Term(loss_PK[audible_PK].sum(), audible_PK.sum())

    def mixtures(
        self, batch: Batch, sounds: int, db: tuple[float, float], clean: str = ""
    ) -> Mixtures:
        """Each item of the batch with `sounds` - 1 others, at random levels; a collective.

        db: the range of the item's level above each of the others. clean: view of the sounds
        themselves, empty = what is heard.
        """
        heard = batch.views[self.spec.view]
        twin = batch.views[clean or self.spec.view]
        lengths_P, seeds_P, count = heard.lengths_P, heard.seeds_P, sounds - 1
        own_PVS = zero_behind(torch.stack([heard.data, twin.data], 1), lengths_P)
        valid_P = item_weight(heard) > 0
        if not count:
            return Mixtures(replace(heard, data=own_PVS[:, 0]), own_PVS[:, 1:], valid_P)
        own_PVS = F.pad(own_PVS, (0, self.samples - own_PVS.shape[2]))
        rows_BVS = own_PVS.new_zeros(batch.size, *own_PVS.shape[1:])
        rows_BVS[heard.rows_P] = own_PVS
        facts = [batch.source_B, row_seeds(batch, self.spec.view), heard.present_B.long()]
        facts.append(torch.zeros_like(batch.source_B).index_put((heard.rows_P,), lengths_P))
        waves_GVS = dist.gather_no_grad(rows_BVS)
        source_G, seeds_G, present_G, lengths_G = dist.gather_no_grad(torch.stack(facts, 1)).T
        source_P, stream = batch.source_B[heard.rows_P], f"{self.name}/with"
        others = (source_G, seeds_G, present_G.bool())
        index_PC, found_P = companions(source_P, seeds_P, *others, count, stream)
        lengths_PK = torch.cat([lengths_P[:, None], lengths_G[index_PC]], 1)
        sound_PKVS = torch.cat([own_PVS[:, None], waves_GVS[index_PC]], 1)
        share_PC = row_uniform(seeds_P, count, f"{self.name}/db")
        gain_PK = levelled(sound_PKVS[:, :, 1], lengths_PK, db[0] + (db[1] - db[0]) * share_PC)
        sound_PKVS = sound_PKVS * gain_PK[..., None, None]
        heard = replace(heard, data=sound_PKVS[:, :, 0].sum(1), lengths_P=lengths_PK.amax(1))
        return Mixtures(heard, sound_PKVS[:, :, 1], valid_P & found_P)

    def separate(self, passes: Passes, view: ViewBatch) -> Tensor:
        """(P, M, S) the sounds in every item of a view, 0 behind its end."""
        stem = passes.tower(self.spec.view).stem
        assert isinstance(stem, WaveStem)  # `build` refuses others
        field = stem.fields()[0]
        edge, samples = max(0, field.size - field.stride), view.data.shape[1]
        width = int(_framed(torch.tensor(samples), field))
        data_PS = F.pad(view.data, (edge, width - samples - edge))
        framed = replace(view, data=data_PS, lengths_P=_framed(view.lengths_P, field))
        tokens = passes.tokens(self.spec.view, source=framed, name=self.name)
        latents_PMNE = self.head(tokens)
        wave_PMS = stem.decode(latents_PMNE.flatten(0, 1)).reshape(*latents_PMNE.shape[:2], -1)
        wave_PMS = wide(wave_PMS[..., edge : edge + samples])
        inside_P1S = torch.arange(samples, device=wave_PMS.device) < view.lengths_P[:, None, None]
        return self.head.consistent(tokens, wave_PMS * inside_P1S, view.data)


def _framed(lengths: Tensor, field: Field) -> Tensor:
    """Lengths with room at both ends, so that every sample is in as many frames, filled up."""
    steps = -(-(lengths + field.size - 2 * field.stride) // field.stride)
    return field.size + steps * field.stride
