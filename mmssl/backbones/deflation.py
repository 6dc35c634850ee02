"""From a video network to an image network (MMV, Alayrac et al. 2020, section 3.3).

P items, D width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from mmssl.backbones.convnets import MapBatchNorm
from mmssl.backbones.resnet import ResNetV2
from mmssl.backbones.s3d import S3DG

Network = TypeVar("Network", S3DG, ResNetV2)


def deflated(network: Network) -> Network:
    """A copy that reads images, as clips of one frame: the paper's naive deflation.

    It differs from the video network on a clip that stands still by the zeros that this one sees
    beyond the clip's ends; `refit` makes up for them.
    """
    image = deepcopy(network)
    image.deflate()
    return image


def refit(
    image: Network,
    video: Network,
    batches: Iterable[Tensor],
    steps: int,
    frames: int = 32,
    lr: float = 1e-2,
) -> list[float]:
    """Fit the image network's batch norm gains and biases, in place, to the video network.

    The L1 distance between the output for an image and that for a clip which repeats it is
    minimised by Adam; all other weights and the running statistics stay. No labels are needed. A
    constant learning rate ends above where it began: what is to be made up for is a few per cent.

    Args:
        image: of `deflated`; left in evaluation mode.
        video: the network it was made of; likewise.
        batches: fp32 images (P, 3, H, W) as the front-end scales them, one step each.
        steps: as many batches are taken; 200 small ones halve the distance of an untrained network.
        frames: of the repeated clip.
        lr: learning rate of the first step, from where it falls to 0 along half a cosine.

    Returns:
        the mean absolute difference before every step.
    """
    image.eval()
    video.eval()
    norms = [m for m in image.modules() if isinstance(m, MapBatchNorm)]
    learned = [p for norm in norms for p in (norm.weight, norm.bias)]
    optimiser = torch.optim.Adam(learned, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    for images in islice(batches, steps):
        clip = images[:, :, None]
        with torch.no_grad():
            target_PD = video(clip.expand(-1, -1, frames, -1, -1))[0].mean(1)
        loss = (image(clip)[0].mean(1) - target_PD).abs().mean()
        for p, grad in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            p.grad = grad
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    for p in learned:
        p.grad = None
    return losses
