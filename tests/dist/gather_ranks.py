"""A toy with every cross-sample objective, run by one rank of a job, for test_gather_gradients.py.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python gather_ranks.py OUT.pt [JSON]

JSON: further problems as [[seed, rows], ...] (`drawn`).

G rows of all ranks, B of this one, L = 2 captions, D = 8 inputs, E = 6 embedded; T bins of S cells
and U audio steps for the dense score. All in fp64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmssl import dist
from mmssl.dist import MaskedSyncBatchNorm
from mmssl.heads.score import Bilinear, FusionMLP, ScoreMap
from mmssl.objectives import classification, contrastive, negatives
from mmssl.objectives.contrastive import Candidates, LogitScale, candidate_mask, in_row_chunks

G, L, D, E, T, S, U = 12, 2, 8, 6, 3, 4, 6
Loss = tuple[Tensor, Tensor]


def problem(seed: int = 0) -> dict[str, Tensor]:
    """The global batch. The first half of the rows has no text; audio and video miss unevenly."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    text = torch.ones(G, L, dtype=torch.bool)
    text[: G // 2] = False
    text[7], text[9, 1] = False, False
    audio, video = torch.ones(G, dtype=torch.bool), torch.ones(G, dtype=torch.bool)
    audio[[1, 6, 7, 8]], video[[0, 2, 11]] = False, False
    return {
        "audio": normal(G, D),
        "video": normal(G, D),
        "text": normal(G, L, D),
        "cells": normal(G, T, S, D),
        "steps": normal(G, U, D),
        "has_audio": audio,
        "has_video": video,
        "has_text": text,
        "source": torch.tensor([0, 1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 9]),
        "caption": torch.tensor([0, 0, 0, 0, 0, 0, 3, 0, 4, 3, 5, 5]),
        "seeds": torch.arange(G) * 7 + 1,
    }


def drawn(seed: int, rows: int) -> dict[str, Tensor]:
    """As `problem`, with what is there drawn at random and a last batch of so many rows.

    The rows behind it have no modality. The first two rows have all, so that every loss has pairs.
    """
    g = torch.Generator().manual_seed(seed)
    out = problem(seed)
    place = torch.arange(G)
    for name in ("audio", "video", "text"):
        known = out[f"has_{name}"]
        there = torch.rand(known.shape, generator=g) < 0.7
        first, filled = (x.view(-1, *[1] * (known.dim() - 1)) for x in (place < 2, place < rows))
        out[f"has_{name}"] = (there | first) & filled
    out["source"] = torch.randint(0, 8, (G,), generator=g).index_fill(0, place[1:2], 9)
    out["caption"] = torch.randint(0, 6, (G,), generator=g)
    return out


class Toy(nn.Module):
    """Encoders with batch norm between and behind the layers, scores and temperatures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.video = self._head(bn=True)
        self.audio = self._head(bn=True)
        self.text = self._head(bn=False)
        self.cell, self.step = nn.Linear(D, E), nn.Linear(D, E)
        self.bilinear, self.fusion = Bilinear(E, std=0.5), FusionMLP(E, E, 10)
        self.scale, self.sigmoid = LogitScale(5.0), LogitScale(10.0, bias=-3.0)
        self.double()

    def _head(self, bn: bool) -> nn.ModuleList:
        layers: list[nn.Module] = [nn.Linear(D, 10), MaskedSyncBatchNorm(10) if bn else nn.Tanh()]
        layers += [nn.Linear(10, E), MaskedSyncBatchNorm(E) if bn else nn.Tanh()]
        return nn.ModuleList(layers)

    def embed(self, name: str, rows: dict[str, Tensor]) -> Tensor:
        """(B, E) or (B, L, E): present items encoded, or one dummy of weight 0; others are 0."""
        x, present = rows[name], rows[f"has_{name}"]
        valid_P = present.flatten().nonzero()[:, 0]
        dummy = valid_P.numel() == 0
        index_P = torch.zeros(1, dtype=torch.int64) if dummy else valid_P
        weight_P = torch.full((index_P.numel(),), not dummy)
        y = x.flatten(0, -2)[index_P]
        for layer in getattr(self, name):
            y = layer(y, weight_P) if isinstance(layer, MaskedSyncBatchNorm) else layer(y)
        out = y.new_zeros(present.numel(), E).index_add(0, index_P, y * weight_P[:, None])
        return out.reshape(*present.shape, E)


def who(rows: dict[str, Tensor], name: str) -> Candidates:
    present = rows[f"has_{name}"]
    present = present.any(1) if present.dim() > 1 else present
    return Candidates.local(rows["source"], present, rows["caption"])


def counted(loss_Q: Tensor, positive_Q: Tensor) -> Loss:
    return loss_Q.sum(), positive_Q.sum()


def two_towers(
    toy: Toy, rows: dict[str, Tensor], loss: Callable[..., Tensor], gather: Any = dist.gather
) -> Loss:
    """Audio-video in both directions, chunked."""
    video, audio = toy.embed("video", rows), toy.embed("audio", rows)
    sides = [(video, who(rows, "video")), (audio, who(rows, "audio"))]
    total, count = [], []
    for (a, query), (b, mine) in (sides, sides[::-1]):
        everyone, b_all = mine.gathered(), gather(b)

        def one(part: slice, a=a, query=query, everyone=everyone, b_all=b_all) -> Tensor:
            return loss(toy, a[part], b_all, *candidate_mask(query[part], everyone))

        total.append(in_row_chunks(one, len(query), 2).sum())
        count.append(candidate_mask(query, everyone)[0].any(1).sum())
    return sum(total) / 2, count[0]  # type: ignore[return-value]


def nce(toy: Toy, a: Tensor, b: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
    return contrastive.info_nce(toy.scale(a @ b.T), positive, valid)


def sigmoid(toy: Toy, a: Tensor, b: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
    return contrastive.sigmoid_pairs(toy.sigmoid(a @ b.T), positive, valid)


def cola(toy: Toy, a: Tensor, b: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
    return contrastive.info_nce(toy.bilinear(a, b), positive, valid, "mean")


def mil(toy: Toy, rows: dict[str, Tensor], form: Any) -> Loss:
    """Video against L captions, equal captions are positives."""
    video, text = toy.embed("video", rows), toy.embed("text", rows)
    videos, texts = who(rows, "video"), who(rows, "text")
    video_all, text_all = dist.gather(video), dist.gather(text)
    present_all = dist.gather_no_grad(rows["has_text"])
    positive, valid_vt = candidate_mask(videos, texts.gathered(), equal_text_positive=True)
    _, valid_tv = candidate_mask(texts, videos.gathered(), equal_text_positive=True)
    loss = contrastive.mil_nce(
        toy.scale(torch.einsum("id,jld->ijl", video, text_all)),
        toy.scale(torch.einsum("jd,ild->ijl", video_all, text)),
        positive,
        valid_vt[..., None] & present_all,
        valid_tv[..., None] & rows["has_text"][:, None],
        form,
    )
    return counted(loss, positive.any(1))


def dense(toy: Toy, rows: dict[str, Tensor], aligned: bool) -> Loss:
    """Cells against audio steps; the scores are gathered, not the video tokens."""
    score = ScoreMap(aligned=aligned, chunk=2)
    videos, audios = who(rows, "video"), who(rows, "audio")
    local = score(toy.cell(rows["cells"]), dist.gather(toy.step(rows["steps"])))
    start = dist.rank() * len(videos)
    backward = dist.gather(local)[:, start : start + len(videos)].T
    positive, valid = candidate_mask(videos, audios.gathered())
    loss = contrastive.info_nce(toy.scale(local), positive, valid)
    back = candidate_mask(audios, videos.gathered())
    loss = loss + contrastive.info_nce(toy.scale(backward), *back)
    return counted(loss, positive.any(1))


def match(toy: Toy, rows: dict[str, Tensor]) -> Loss:
    """True pairs against partners, a third of them the hardest of the batch."""
    video, audio = toy.embed("video", rows), toy.embed("audio", rows)
    videos, audios = who(rows, "video"), who(rows, "audio")
    both = replace(videos, present=videos.present & audios.present)
    everyone, audio_all = both.gathered(), dist.gather(audio)
    mine = slice(dist.rank() * len(both), (dist.rank() + 1) * len(both))
    seeds = dist.gather_no_grad(rows["seeds"])
    partner, found = negatives.partners(everyone.source, seeds, everyone.present)
    positive, valid = candidate_mask(both, everyone)
    hard = negatives.hardest(video @ audio_all.T, valid & ~positive)
    index, found, _ = negatives.mix_hard((partner[mine], found[mine]), hard, rows["seeds"], 1 / 3)
    yes = toy.fusion.logits(video, audio)
    no = toy.fusion.logits(video, audio_all[index])
    ones = torch.ones_like(index)
    loss = classification.softmax_cross_entropy(yes, ones, both.present)
    loss = loss + classification.softmax_cross_entropy(no, 0 * ones, found & both.present)
    return counted(loss, both.present)


def plain_gather(x: Tensor) -> Tensor:
    """The common wrong recipe: remote rows without gradient."""
    out = dist.gather_no_grad(x)
    start = dist.rank() * len(x)
    return torch.cat([out[:start], x, out[start + len(x) :]])


CASES: dict[str, Callable[[Toy, dict[str, Tensor]], Loss]] = {
    "info_nce": lambda toy, rows: two_towers(toy, rows, nce),
    "sigmoid": lambda toy, rows: two_towers(toy, rows, sigmoid),
    "bilinear": lambda toy, rows: two_towers(toy, rows, cola),
    "mil_released": lambda toy, rows: mil(toy, rows, "released"),
    "mil_strict": lambda toy, rows: mil(toy, rows, "strict"),
    "mil_symmetric": lambda toy, rows: mil(toy, rows, "symmetric"),
    "dense": lambda toy, rows: dense(toy, rows, aligned=False),
    "dense_aligned": lambda toy, rows: dense(toy, rows, aligned=True),
    "match": match,
    "plain_gather": lambda toy, rows: two_towers(toy, rows, nce, plain_gather),
}


def run(case: str, batch: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Loss, parameter gradients and batch-norm buffers of one step, equal on every rank."""
    batch = batch or problem()
    world, size = dist.world_size(), len(batch["source"]) // dist.world_size()
    rows = {k: v[dist.rank() * size :][:size] for k, v in batch.items()}
    toy = Toy()
    total, count = CASES[case](toy, rows)
    everything = dist.sum_over_ranks(count)
    (world * total / everything).backward()
    gradients = {k: p.grad for k, p in toy.named_parameters() if p.grad is not None}
    return {
        "loss": dist.sum_over_ranks(total) / everything,
        # What DeepSpeed does: the mean over ranks.
        "gradients": {k: dist.sum_over_ranks(v) / world for k, v in gradients.items()},
        "touched": dist.gather_objects(sorted(gradients)),
        "buffers": {k: v.clone() for k, v in toy.named_buffers()},
    }


def normalise() -> dict[str, Any]:
    """Batch norm of the rows with text (none on the first rank), with the input's gradient."""
    size = G // dist.world_size()
    rows = {k: v[dist.rank() * size :][:size] for k, v in problem().items()}
    norm = MaskedSyncBatchNorm(D).double()
    x = rows["video"].requires_grad_()
    y = norm(x, rows["has_text"].any(1))
    weight = torch.arange(1.0, D + 1, dtype=torch.float64)
    (y.square() * y * weight).sum().backward()
    return {
        "y": dist.gather_no_grad(y),
        "x_grad": dist.gather_no_grad(x.grad),  # type: ignore[arg-type]
        "weight_grad": dist.sum_over_ranks(norm.weight.grad),  # type: ignore[arg-type]
        "buffers": dict(norm.named_buffers()),
    }


def collectives() -> dict[str, Any]:
    """Order and types of the simple collectives."""
    me = dist.rank()
    ids = torch.tensor([[10 * me, 10 * me + 1]])
    x = torch.full((2, 1), float(me + 1), requires_grad=True)
    (dist.gather(x) * (me + 1) * torch.arange(2 * dist.world_size())[:, None]).sum().backward()
    y = torch.full((1,), 2.0, requires_grad=True)
    (dist.sum_with_gradient(y) * (me + 1)).backward()
    return {
        "gather": dist.gather(x).detach()[:, 0].tolist(),
        "x_grad": dist.gather_no_grad(x.grad)[:, 0].tolist(),  # type: ignore[arg-type]
        "y_grad": y.grad.item(),  # type: ignore[union-attr]
        "ids": dist.gather_no_grad(ids).tolist(),
        "flags": dist.gather_no_grad(torch.tensor([me == 0])).tolist(),
        "empty": list(dist.gather(torch.zeros(0, 3)).shape),
        "halves": dist.gather(torch.ones(1, dtype=torch.bfloat16) * me).tolist(),
        "sum": dist.sum_over_ranks(torch.tensor([me, 1])).tolist(),
        "object": dist.broadcast_object({"from": me}, source=1),
        "objects": dist.gather_objects("x" * me),
    }


def main(out: str, problems: str = "[]") -> None:
    torch.set_num_threads(1)
    dist.init("gloo", timeout_s=600)
    results = {"cases": {case: run(case) for case in CASES}}
    results["problems"] = [
        {case: run(case, drawn(*one)) for case in CASES} for one in json.loads(problems)
    ]
    results |= {"norm": normalise(), "collectives": collectives()}
    if dist.rank() == 0:
        torch.save(results, out)
    dist.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
