"""Projection heads: modality vectors to the common spaces in which they are compared.

D input width, S width of a space; leading axes are free (P items, or P items x N tokens). Vectors
are not normalised here: the score decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmssl.dist import MaskedSyncBatchNorm
from mmssl.types import UserError

FORMS: dict[str, Callable[[int, int, int, bool], list[nn.Module]]] = {
    # form: (input width, space width, hidden width, bias of a linear map that a norm follows)
    "none": lambda d, s, h, b: [],
    "linear": lambda d, s, h, b: [nn.Linear(d, s)],
    "norm_linear": lambda d, s, h, b: [nn.LayerNorm(d, eps=1e-6), nn.Linear(d, s)],
    "bn_linear": lambda d, s, h, b: [MaskedSyncBatchNorm(d), nn.Linear(d, s, bias=False)],
    "bn_relu_linear": lambda d, s, h, b: [MaskedSyncBatchNorm(d), nn.ReLU(), nn.Linear(d, s)],
    "mlp": lambda d, s, h, b: [nn.Linear(d, h), nn.ReLU(), nn.Linear(h, s)],
    "mlp_bn": lambda d, s, h, b: [
        nn.Linear(d, h, bias=b),
        MaskedSyncBatchNorm(h),
        nn.ReLU(),
        nn.Linear(h, s, bias=False),
        MaskedSyncBatchNorm(s),
    ],
    "relu_linear_bn": lambda d, s, h, b: [
        nn.ReLU(),
        nn.Linear(d, s, bias=False),
        MaskedSyncBatchNorm(s),
    ],
    "mlp_bn_linear": lambda d, s, h, b: [
        nn.Linear(d, h, bias=b),
        MaskedSyncBatchNorm(h),
        nn.ReLU(),
        nn.Linear(h, s),
    ],
    "linear_norm_tanh": lambda d, s, h, b: [nn.Linear(d, s), nn.LayerNorm(s), nn.Tanh()],
}
GRAPHS = ("linear", "shared", "disjoint", "fac")


class Head(nn.Module):
    """One projection, by form.

    none: the vector itself; linear; norm_linear = LayerNorm, Linear; bn_linear = BN, Linear;
    bn_relu_linear = BN, ReLU, Linear (CLAR's classes); mlp = Linear, ReLU, Linear (AVE-Net); mlp_bn
    = Linear, BN, ReLU, Linear, BN (MMV, VATT, SimCLR); mlp_bn_linear = the same without the last BN
    (CLAR with classes);
    relu_linear_bn = ReLU, Linear, BN (VATT's joint head); linear_norm_tanh = Linear, LayerNorm,
    tanh (COLA). hidden 0 means the output width.
    """

    def __init__(
        self, form: str, inputs: int, outputs: int, hidden: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise UserError(f"head form: {form!r} is not known; use one of {', '.join(FORMS)}")
        if form == "none" and inputs != outputs:
            raise UserError(
                f"head form: `none` keeps the width of {inputs}, but {outputs} is asked for; make "
                "them equal (dim, or the tower's `post`) or use form linear"
            )
        self.layers = nn.ModuleList(FORMS[form](inputs, outputs, hidden or outputs, bias))

    def forward(self, x: Tensor, valid_P: Tensor | None = None) -> Tensor:
        """(..., inputs) to (..., outputs); rows that are not valid enter no batch statistics.

        valid_P: bool over the leading axes of `x`, or its first ones.
        """
        for layer in self.layers:
            if isinstance(layer, MaskedSyncBatchNorm):
                x = layer(x, _per_row(valid_P, x))
            else:
                x = layer(x.to(_dtype(layer, x)))
        return x


class SpaceHeads(nn.Module):
    """Heads of all modalities into all spaces, wired as one of four graphs.

    widths: {modality: D}; spaces: {space: S}.

    linear: one head of `form` (default norm_linear) per space and modality. `members` lists the
    modalities of each space; by default each space has all.

    shared: one space, one head of the same `form` (default mlp_bn) per modality.

    disjoint: spaces va and vt; two independent video heads (mlp_bn), linear audio->va and text->vt.
    Audio and text cannot be compared.

    fac (MMV, section 3.1; spaces va and vat): video->va mlp_bn, audio->va linear, text->vat linear,
    and va->vat relu_linear_bn applied to the video's va vector. Audio reaches vat through the same
    va->vat head, in evaluation only: in training it would pollute that head's batch norm.
    audio_norm gives audio a batch norm of its own behind the shared linear map and lifts the ban.

    bias: bias of the first video layer (MMV's release has one, VATT's has not).
    """

    def __init__(
        self,
        graph: str,
        widths: Mapping[str, int],
        spaces: Mapping[str, int],
        members: Mapping[str, Sequence[str]] | None = None,
        form: str = "",
        hidden: int = 0,
        bias: bool = True,
        audio_norm: bool = False,
    ) -> None:
        super().__init__()
        if graph not in GRAPHS:
            raise UserError(f"graph: {graph!r} is not known; use one of {', '.join(GRAPHS)}")
        self.graph, self.spaces = graph, dict(spaces)
        plan = _plan(graph, widths, spaces, members, form)
        self.heads = nn.ModuleDict(
            {
                _name(modality, space): Head(kind, widths[modality], spaces[space], hidden, bias)
                for (modality, space), kind in plan.items()
            }
        )
        self.va_vat: Head | None = None
        self.audio_norm: MaskedSyncBatchNorm | None = None
        if graph == "fac" and "vat" in spaces:
            self.va_vat = Head("relu_linear_bn", spaces["va"], spaces["vat"])
            if audio_norm:
                self.audio_norm = MaskedSyncBatchNorm(spaces["vat"])

    def leads(self, modality: str, space: str) -> bool:
        """The modality has a head of its own into the space."""
        return _name(modality, space) in self.heads

    def project(
        self, x: Tensor, modality: str, space: str, valid_P: Tensor | None = None
    ) -> Tensor:
        """(..., D) of a modality to (..., S) of a space.

        valid_P: bool over the leading axes, or the first ones; False rows enter no batch
        statistics. To get several spaces of one modality in training use `project_all`: it runs
        each head once.

        Raises:
            UserError: the graph has no such head, or audio->vat in training without `audio_norm`.
        """
        return self.project_all(x, modality, (space,), valid_P)[space]

    def project_all(
        self, x: Tensor, modality: str, spaces: Sequence[str], valid_P: Tensor | None = None
    ) -> dict[str, Tensor]:
        """{space: (..., S)} of a modality, every head run once.

        Raises:
            UserError: as `project`.
        """
        out: dict[str, Tensor] = {}
        fine = None
        for space in dict.fromkeys(spaces):
            if self.leads(modality, space):
                out[space] = self.heads[_name(modality, space)](x, valid_P)
                fine = out[space] if space == "va" else fine
        for space in dict.fromkeys(spaces):
            if space not in out:
                self._check_coarse(modality, space)
                if fine is None:
                    fine = self.heads[_name(modality, "va")](x, valid_P)
                out[space] = self._coarse(fine, modality, valid_P)
        return out

    def _check_coarse(self, modality: str, space: str) -> None:
        if self.va_vat is None or space != "vat" or not self.leads(modality, "va"):
            known = ", ".join(name.replace("_to_", " -> ") for name in self.heads)
            raise UserError(
                f"heads: no way from {modality} to space {space!r} in graph {self.graph}; "
                f"there are {known}"
            )
        if modality == "audio" and self.training and self.audio_norm is None:
            raise UserError(
                "heads: audio -> vat of graph fac exists in evaluation only; to train audio "
                "against text set audio_norm, or use graph shared or linear"
            )

    def _coarse(self, fine: Tensor, modality: str, valid_P: Tensor | None) -> Tensor:
        """ReLU, Linear, BN of a va vector."""
        assert self.va_vat is not None
        if modality != "audio" or self.audio_norm is None:
            out: Tensor = self.va_vat(fine, valid_P)
            return out
        relu, linear, _ = self.va_vat.layers
        x = linear(relu(fine))
        normed: Tensor = self.audio_norm(x, _per_row(valid_P, x))
        return normed


def _plan(
    graph: str,
    widths: Mapping[str, int],
    spaces: Mapping[str, int],
    members: Mapping[str, Sequence[str]] | None,
    form: str,
) -> dict[tuple[str, str], str]:
    """{(modality, space): form} of the heads that read a tower directly."""
    if members is not None and graph != "linear":
        raise UserError(
            f"heads: members is an option of graph linear, not of {graph}; leave it out"
        )
    if graph == "linear":
        chosen = members or {space: tuple(widths) for space in spaces}
        plan = {(m, space): form or "norm_linear" for space in chosen for m in chosen[space]}
    elif graph == "shared":
        if len(spaces) != 1:
            raise UserError(f"heads: graph shared has one space, not {sorted(spaces)}")
        plan = {(m, space): form or "mlp_bn" for space in spaces for m in widths}
    else:
        if form:
            raise UserError(f"heads: graph {graph} fixes the form of its heads; leave form out")
        coarse = "vat" if graph == "fac" else "vt"
        plan = {("video", "va"): "mlp_bn", ("audio", "va"): "linear", ("text", coarse): "linear"}
        if graph == "disjoint":
            plan["video", "vt"] = "mlp_bn"
        if "va" not in spaces or not set(spaces) <= {"va", coarse}:
            raise UserError(
                f"heads: graph {graph} has the spaces va and {coarse}, not {sorted(spaces)}"
            )
        plan = {key: kind for key, kind in plan.items() if key[1] in spaces}
    missing = sorted({f"{m} -> {s}" for m, s in plan if m not in widths or s not in spaces})
    if missing:
        raise UserError(
            f"heads: {', '.join(missing)} needs a tower and a space; there are the towers "
            f"{sorted(widths)} and the spaces {sorted(spaces)}"
        )
    return plan


def _name(modality: str, space: str) -> str:
    return f"{modality}_to_{space}"


def _per_row(valid_P: Tensor | None, x: Tensor) -> Tensor | None:
    if valid_P is None:
        return None
    return valid_P.reshape(*valid_P.shape, *([1] * (x.ndim - 1 - valid_P.ndim))).expand(
        x.shape[:-1]
    )


def _dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    return next((p.dtype for p in layer.parameters()), x.dtype)
