"""Teachers: moving averages of a part of the model, kept as buffers.

As buffers they are saved and restored with the model, get no gradient and no optimiser state, stay
fp32 under autocast, and are whole at every ZeRO stage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmssl.partition import assemble, piece
from mmssl.schedules import resolve
from mmssl.specs import Number


class Teacher(nn.Module):
    """Exponential moving average of a student module (data2vec, BYOL, MoCo).

    student: is read after every step and is not owned. decay: share of the old weights that stays;
    may be a schedule over the run. Runs in evaluation mode, whatever mode the model is in, with the
    student's running statistics, unless it `follows` that mode: then its batch norms read its own
    batch while the model trains, and keep running statistics of their own, as its weights are
    others; its dropout is on (BYOL, MoCo).

    lag: () distance of its weights from the student's after the last update, over the norm of the
    student's; 0 before the first one.
    """

    def __init__(self, student: nn.Module, decay: Number, follows: bool = False) -> None:
        super().__init__()
        self._student = (student,)  # a tuple hides it from this module's parameters
        self.decay, self.follows = decay, follows
        self.twin = as_buffers(copy.deepcopy(student)).train(follows)
        self.lag = torch.zeros(())

    def train(self, mode: bool = True) -> Teacher:
        """A teacher that does not follow never drops anything out."""
        super().train(mode)
        self.twin.train(mode and self.follows)
        return self

    @torch.no_grad()
    def update(self, position: float) -> None:
        """Move the weights by t <- decay * t + (1 - decay) * s; a collective at ZeRO-3."""
        decay = resolve(self.decay, position)
        student = self._student[0]
        trained = dict(student.named_parameters())
        kept = dict(student.named_buffers())
        gaps, sizes = [], []
        for name, buffer in self.twin.named_buffers():
            if name in trained:
                weight = _whole(trained[name]).to(buffer.dtype)
                buffer.lerp_(weight, 1 - decay)
                gaps.append(torch.dist(weight, buffer))
                sizes.append(torch.linalg.vector_norm(weight))
            elif not self.follows:
                buffer.copy_(kept[name])
        self.lag = torch.stack(gaps).norm() / torch.stack(sizes).norm()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation for a while, each part back to what it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def as_buffers(module: nn.Module) -> nn.Module:
    """The same module with its parameters turned into persistent buffers, in place."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            whole = _whole(parameter).detach().float().clone()
            delattr(part, name)
            part.register_buffer(name, whole)
            setattr(part, name, whole)  # recurrent layers keep a list of their weights, too
    return module


def _whole(parameter: nn.Parameter) -> Tensor:
    return assemble(parameter, piece(parameter))
