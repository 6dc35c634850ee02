"""From a video network to an image network (MMV, Alayrac et al. 2020, section 3.3).

P items, D width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
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
    frames: int = 32,
    lr: float = 1e-2,
) -> list[float]:
    """Fit the image network's batch norm gains and biases, in place, to the video network.

    The L1 distance between the output for an image and that for a clip which repeats it is
    minimised by Adam; all other weights and the running statistics stay. No labels are needed.

    Args:
        image: of `deflated`; left in evaluation mode.
        video: the network it was made of; likewise.
        batches: fp32 images (P, 3, H, W) as the front-end scales them, one step each.
        frames: of the repeated clip.
        lr: learning rate, the same in all steps.

    Returns:
        the mean absolute difference before every step.
    """
    image.eval()
    video.eval()
    norms = [m for m in image.modules() if isinstance(m, MapBatchNorm)]
    learned = [p for norm in norms for p in (norm.weight, norm.bias)]
    optimiser = torch.optim.Adam(learned, lr)
    losses = []
    for images in batches:
        clip = images[:, :, None]
        with torch.no_grad():
            target_PD = video(clip.expand(-1, -1, frames, -1, -1))[0].mean(1)
        loss = (image(clip)[0].mean(1) - target_PD).abs().mean()
        for p, grad in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            p.grad = grad
        optimiser.step()
        losses.append(float(loss.detach()))
    for p in learned:
        p.grad = None
    return losses
