"""The sounds in a user's recordings: `mmssl.load(run).separate(...)`.

Letters in shapes: M outputs, S samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmssl.embed.sources import Row
from mmssl.embed.windows import Cutter, collated
from mmssl.eval.separation import separator
from mmssl.model import Model
from mmssl.specs import ViewSpec
from mmssl.targets.teacher import evaluating
from mmssl.types import UserError


def separated(model: Model, views: Mapping[str, ViewSpec], rows: Iterable[Row]) -> list[Tensor]:
    """(M, S) fp32 of every row, at the rate of the view; see `EmbeddingModel.separate`.

    views: as they read a user's media.
    """
    task, longest_s = separator(model), model.spec.data.max_seconds
    name, device = task.spec.view, next(model.parameters()).device
    whole = views[name].model_copy(update={"crop_s": longest_s})
    cutter = Cutter({name: whole}, None, {name})
    found: list[Tensor] = []
    with evaluating(model), torch.inference_mode():
        for i, row in enumerate(rows):
            for piece in cutter.pieces(i, row):
                if piece.start_s > 0:
                    raise UserError(
                        f"{row.name}, audio: is longer than data.max_seconds ({longest_s:g} s), "
                        "which is taken apart at once; cut it"
                    )
                # alone in its batch, it needs no padding, which learned positions would feel
                exact = replace(piece, padded_s=len(piece.data.data) / whole.hz)
                batch = collated([exact], whole).to(device)
                found.append(task.separate(model.passes(batch), batch.views[name])[0].cpu())
    return found
