"""Use of a codebook and predictive information on the ranks of a job, for test_code_ranks.py: torchrun code_ranks.py OUT.pt.

G = 8 rows of all ranks with N = 5 frames; the rows of the last rank have no valid frame.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from mmssl import dist
from mmssl.objectives.codes import diversity, perplexity, usage
from mmssl.objectives.predictive import predictive_information, whiteness
from mmssl.quantizers import GumbelQuantizer

G, N, D = 8, 5, 6


def run() -> dict[str, Any]:
    """Diversity, its gradients and perplexities of one step, in fp64, equal on every rank."""
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(D, 8, groups=2, entries=7).double()
    g = torch.Generator().manual_seed(1)
    z = torch.randn(G, N, D, generator=g, dtype=torch.float64)
    valid = torch.rand(G, N, generator=g) < 0.6
    valid[G // 2 :] = False
    size = G // dist.world_size()
    mine = slice(dist.rank() * size, (dist.rank() + 1) * size)
    seeds = torch.arange(G)[mine]
    codes = quantizer(z[mine], valid[mine], 1.0, quantizer.noise(seeds, N))
    total, count = diversity(codes.soft_GV, codes.count)
    everyone = dist.sum_over_ranks(count)
    (dist.world_size() * total / everyone).backward()
    latents = torch.nn.Linear(D, 2, bias=False).double()
    information = 0.0
    for loss, frames in (
        predictive_information(latents(z[mine]), valid[mine], 1, 1e-3),
        whiteness(latents(z[mine]), valid[mine]),
    ):
        mean = dist.world_size() * loss / dist.sum_over_ranks(frames)
        mean.backward()
        information += dist.sum_over_ranks(mean.detach()) / dist.world_size()
    gradients = {
        name: dist.sum_over_ranks(p.grad) / dist.world_size()
        for name, p in [*quantizer.named_parameters(), *latents.named_parameters("latents")]
        if p.grad is not None
    }
    return {
        "loss": dist.sum_over_ranks(total.detach()) / everyone,
        "gradients": gradients,
        "soft": perplexity(codes.soft_GV, codes.count),
        "hard": perplexity(codes.hard_GV, codes.count),
        "information": information,
        "usage": usage(codes.hard_GV),
        "ids": dist.gather_no_grad(codes.ids_PNG),
        "count": everyone,
    }


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init("gloo", timeout_s=600)
    results = run()
    if dist.rank() == 0:
        torch.save(results, out)
    dist.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
