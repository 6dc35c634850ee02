"""`init: PATH` of a tower, a joint tower or the shared trunk: weights to start from."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mmssl.model import Model
from mmssl.specs import RunSpec
from mmssl.train.checkpoint import load_weights
from mmssl.types import UserError


def load_start_weights(model: Model, spec: RunSpec) -> list[str]:
    """Copy the weights that the run's `init` entries name into a new model.

    A part takes the tensors of the part of the same name; every one of its tensors must be there
    with the same shape. Averaged weights are taken where the source kept them.

    Returns:
        the names that were loaded.

    Raises:
        UserError: no such checkpoint, or tensors that are missing or of another shape.
    """
    state = model.state_dict()
    loaded: list[str] = []
    for key, path, prefix in _wanted(spec):
        source = _read(f"{key}.init", path)
        own = [name for name in state if name.startswith(prefix)]
        missing = [name for name in own if name not in source]
        if missing:
            raise UserError(
                f"{key}.init: {path} lacks {', '.join(missing[:4])}"
                f"{' ...' if len(missing) > 4 else ''}; its towers must have the same parts"
            )
        for name in own:
            if source[name].shape != state[name].shape:
                raise UserError(
                    f"{key}.init: {name} has shape {tuple(source[name].shape)} in {path} and "
                    f"{tuple(state[name].shape)} in this run; make the widths and grids equal"
                )
            state[name].copy_(source[name])
        loaded += own
    return loaded


def _wanted(spec: RunSpec) -> Iterator[tuple[str, str, str]]:
    """(configuration key, path, prefix of the parameters) of every `init`."""
    if spec.shared is not None and spec.shared.init:
        yield "shared", spec.shared.init, "trunk."
    for name, tower in spec.towers.items():
        if tower.init:
            yield f"towers.{name}", tower.init, f"towers.{name}."
    for name, joint in spec.joints.items():
        if joint.init:
            yield f"joints.{name}", joint.init, f"joints.{name}."


def _read(key: str, path: str) -> dict[str, Tensor]:
    try:
        return load_weights(path, ema=not path.endswith(".safetensors"))
    except UserError:  # a run that does not average
        try:
            return load_weights(path)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
