"""Learning-rate factors and freezing of every parameter."""

from __future__ import annotations

from torch import nn

from mmssl.specs import (
    CausalConvSpec,
    DilatedConvSpec,
    RecurrentSpec,
    RunSpec,
    Trainable,
    TransformerSpec,
)

_LAYERED = TransformerSpec | CausalConvSpec | DilatedConvSpec | RecurrentSpec

_ON_TOP = ("norm.", "trunk.norm.", "own_trunk.norm.", "post.")


def policy_of(spec: RunSpec, model: nn.Module) -> dict[str, tuple[float, bool]]:
    """{parameter: (learning-rate factor, frozen)} from the towers' own settings."""
    groups: list[tuple[str, Trainable, int]] = []
    if spec.shared is not None:
        groups.append(("trunk.", spec.shared, spec.shared.layers))
    for name, tower in spec.towers.items():
        backbone = tower.backbone
        own = 0
        if isinstance(backbone, _LAYERED):
            own = backbone.layers
        groups.append((f"towers.{name}.", tower, own))
    for name, joint in spec.joints.items():
        groups.append((f"joints.{name}.", joint, joint.backbone.layers))
    out = {}
    for parameter, _ in model.named_parameters():
        for prefix, part, layers in groups:
            if parameter.startswith(prefix):
                depth = _layers_above(parameter.removeprefix(prefix), layers)
                out[parameter] = (part.lr_scale * part.layer_decay**depth, part.freeze)
    return out


def _layers_above(parameter: str, layers: int) -> int:
    """How many layers lie between a parameter, named within its tower, and the tower's top."""
    parts = parameter.split(".")
    if "blocks" in parts:
        return layers - int(parts[parts.index("blocks") + 1])
    return 0 if parameter.startswith(_ON_TOP) else layers + 1
