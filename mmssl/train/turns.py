"""Players of one model, each with a DeepSpeed engine and an optimiser of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmssl import dist
from mmssl.model import Model, ParamPolicy
from mmssl.specs import OptimSpec, TrainSpec
from mmssl.train.commit import Writer
from mmssl.train.engine import Engine
from mmssl.types import Batch, Term, UserError


class Part(nn.Module):
    """The model as one of its players trains it: everything else is frozen."""

    def __init__(self, model: Model, own: set[str]) -> None:
        super().__init__()
        self.model, self._own = model, own

    def forward(self, batch: Batch, step: int, total: int) -> tuple[Tensor, dict[str, Term]]:
        """The model's."""
        out: tuple[Tensor, dict[str, Term]] = self.model(batch, step, total)
        return out

    def parameter_policy(self) -> dict[str, ParamPolicy]:
        """The model's, by this module's names."""
        return {
            f"model.{name}": replace(policy, frozen=policy.frozen or name not in self._own)
            for name, policy in self.model.parameter_policy().items()
        }


class Turns:
    """In the place of `Engine`: a step is that of the player whose turn it is.

    While one plays, the parameters of the others need no gradient: nothing reduces, clips, counts
    or moves them. A checkpoint has a folder for each; whose turn is next follows from the step.
    """

    def __init__(
        self, model: Model, optim: OptimSpec, train: TrainSpec, device: torch.device
    ) -> None:
        """Make the engines.

        Raises:
            UserError: a ZeRO stage that partitions gradients or parameters; else as `Engine`.
        """
        if train.zero > 1:
            raise UserError(
                f"train.zero: {train.zero}, but with players a parameter has no gradient in the "
                "turns of others, which only 0 and 1 can do without; use one of these"
            )
        self.model, self.device, self.stage = model, device, int(train.zero)
        owner, trained = (
            model.players(),
            {n for n, p in model.named_parameters() if p.requires_grad},
        )
        self._own: dict[str, set[str]] = {}
        for name in trained:
            self._own.setdefault(owner[name], set()).add(name)
        self._engines: dict[str, Engine] = {}
        for player in dict.fromkeys(owner.values()):
            self._give(player)
            part = Part(model, self._own.get(player, set()))
            self._engines[player] = Engine(part, optim, train, device)
        self._player = ""

    def _give(self, player: str) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._own.get(player, set()))

    def forward(self, batch: Batch, step: int, total: int) -> tuple[Tensor, dict[str, Term]]:
        """As `Engine.forward`, in the turn of step `step`."""
        self._player = self.model.turn(step)
        self._give(self._player)
        return self._engines[self._player].forward(batch, step, total)

    def backward(self, loss: Tensor) -> None:
        """As `Engine.backward`."""
        self._engines[self._player].backward(loss)

    def step(self, lr: float) -> float:
        """As `Engine.step`; the norm is that of the player's gradient."""
        return self._engines[self._player].step(lr)

    def save(self, writer: Writer, name: str) -> None:
        """Write the shards of each player into a folder inside `name`."""
        for player, engine in self._engines.items():
            engine.save(writer, f"{name}/{player}")

    def load(self, folder: Path, ranks: int) -> None:
        """Read what `save` wrote.

        Raises:
            UserError: partitioned states of another number of ranks; else as `Engine`.
        """
        if self.stage and ranks != dist.world_size():
            raise UserError(
                f"{folder}: written by {ranks} processes, here are {dist.world_size()}; with "
                "players and train.zero above 0 go on with as many"
            )
        for player, engine in self._engines.items():
            engine.load(folder / player, ranks)

    def close(self) -> None:
        """As `Engine.close`."""
        for engine in self._engines.values():
            engine.close()


def make_engine(
    model: nn.Module, optim: OptimSpec, train: TrainSpec, device: torch.device
) -> Engine | Turns:
    """An engine, or one for each player of a model that has some."""
    if isinstance(model, Model) and model.players():
        return Turns(model, optim, train, device)
    return Engine(model, optim, train, device)
