"""Convolutional towers on the ranks of a job, for test_conv_ranks.py: torchrun conv_ranks.py OUT.pt.

G = 4 items of all ranks, of several lengths; the last does not exist.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from mmssl import dist
from mmssl.backbones import S3DG, SincNet, WaveResNet18
from mmssl.backbones.byola import BYOLA
from mmssl.backbones.convnets import ConvNet
from mmssl.backbones.resnet import ResNetV2

G = 4
LENGTHS, VALID = torch.tensor([12, 7, 9, 12]), torch.tensor([True, True, True, False])
TINY = {"channels": 8, "blocks": [1, 1, 1, 1]}
NETWORKS = {
    "s3dg": (lambda: S3DG(channels=8), (3, 12, 32, 32)),
    "tsm": (lambda: ResNetV2(3, **TINY, shift=0.125), (3, 12, 32, 32)),
    "resnet": (lambda: ResNetV2(1, **TINY), (1, 12, 40)),
    "byol_a": (lambda: BYOLA(version=2, bands=40, hidden=16, dropout=0.0), (1, 12, 40)),
    "wave_resnet": (lambda: WaveResNet18(channels=8), (1, 768)),
    "sincnet": (lambda: SincNet(samples=400, shift=100, filters=8, widths=(16, 16)), (1, 768)),
}


def step(net: ConvNet, x: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and statistics of one training step in fp64, equal on every rank."""
    size = G // dist.world_size()
    mine = slice(dist.rank() * size, (dist.rank() + 1) * size)
    tokens, _ = net(x[mine], x.shape[2] // LENGTHS.max() * LENGTHS[mine], VALID[mine])
    # cubes: the sum of squares behind a batch norm hardly depends on what came before
    total = (tokens.mean(1)[VALID[mine]] ** 3).sum() + 0 * tokens.sum()
    (dist.world_size() * total).backward()
    found = {n: dist.sum_over_ranks(p.grad) / dist.world_size() for n, p in net.named_parameters()}
    found["loss"] = dist.sum_over_ranks(total.detach().reshape(1))
    return found | dict(net.named_buffers())


def run() -> dict[str, dict[str, Tensor]]:
    """`step` of every network."""
    found = {}
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        net = make().double().train()
        found[name] = step(net, torch.rand(G, *shape, dtype=torch.float64))
    return found


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init("gloo", timeout_s=600)
    results = run()
    if dist.rank() == 0:
        torch.save(results, out)
    dist.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
