"""Quantizers: latents to a finite set of codes, straight through.

Letters in shapes: P rows, N frames, D width of a latent, G groups, C codebooks (G, or 1 that all
share), V entries of a group, W width of an entry, Q = G * W width of a quantised vector.

All work is in fp32 or wider, autocast or not: in 16 bits the small values of Gumbel noise are lost.
The value of a quantised vector is exactly the chosen entries, so that equal ids mean equal vectors.
Frames that are not valid count nowhere, may hold anything, receive no gradient and come out as
zeros (their ids mean nothing). A row's codes are a function of its own latents and seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl import dist
from mmssl.objectives.precision import wide
from mmssl.rng import row_uniform
from mmssl.types import Codes, UserError

# The smallest uniform number is 0, whose Gumbel number is minus infinity; the largest is 1 - 2^-24.
_SMALLEST = 2.0**-25
_EPS = 1e-5  # Laplace smoothing of how often the entries of an averaged codebook are chosen


class GumbelQuantizer(nn.Module):
    """Product quantizer with straight-through Gumbel softmax (Jang et al. 2017).

    Logits are one linear map (wav2vec 2.0, Baevski et al. 2020; weight normal(0, 1), bias 0) or,
    with `hidden` > 0, Linear, activation, Linear (vq-wav2vec, Baevski et al. 2020; torch's init).
    The codebook starts uniform in [0, 1). Training chooses argmax(logits + noise) and sends the
    gradient of softmax((logits + noise) / temperature); evaluation chooses argmax(logits).
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        groups: int,
        entries: int,
        shared_codebook: bool = False,
        hidden: int = 0,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        """Set up `groups` codebooks of `entries`, or one that all groups share.

        Raises:
            UserError: `width_out` does not split into the groups.
        """
        super().__init__()
        self.width_out, self.groups, self.entries = width_out, groups, entries
        self.activation = activation
        books, width = 1 if shared_codebook else groups, _entry_width(width_out, groups)
        self.codebook = nn.Parameter(torch.rand(books, entries, width))
        self.hidden = nn.Linear(width_in, hidden) if hidden else None
        self.logits = nn.Linear(hidden or width_in, groups * entries)
        if self.hidden is None:
            nn.init.normal_(self.logits.weight)
            nn.init.zeros_(self.logits.bias)

    def noise(self, seeds_P: Tensor, frames: int, stream: str = "gumbel") -> Tensor:
        """(P, frames, G, V) uniform numbers of `forward`; a frame's do not depend on `frames`.

        Latents that are quantised twice in a step name two streams.
        """
        u_PK = row_uniform(seeds_P, frames * self.groups * self.entries, stream)
        return u_PK.reshape(-1, frames, self.groups, self.entries)

    def forward(
        self,
        z_PND: Tensor,
        valid_PN: Tensor | None = None,
        temperature: float = 1.0,
        uniform_PNGV: Tensor | None = None,
    ) -> Codes:
        """Quantise latents.

        Args:
            z_PND: latents.
            valid_PN: bool, default all.
            temperature: of the relaxation whose gradient is used, above 0.
            uniform_PNGV: numbers of `noise`, read in training only.

        Raises:
            ValueError: training without noise, noise of another shape, or a temperature of 0 or
                less.
        """
        with torch.autocast(z_PND.device.type, enabled=False):
            z_PND, valid_PN = _blanked(z_PND, valid_PN)
            logits_PNGV = self._logits(z_PND)
            if self.training:
                noisy_PNGV = logits_PNGV + self._gumbel(uniform_PNGV, logits_PNGV, temperature)
                ids_PNG = noisy_PNGV.argmax(-1)
                relaxed_PNGV = (noisy_PNGV / temperature).softmax(-1)
                vectors_PNGW = _lookup(ids_PNG, self.codebook) + self._through(relaxed_PNGV)
            else:
                ids_PNG = logits_PNGV.argmax(-1)
                vectors_PNGW = _lookup(ids_PNG, self.codebook)
            weight_PN = valid_PN.to(logits_PNGV.dtype)
            return Codes(
                vectors_PNGW.flatten(2) * weight_PN[..., None],
                ids_PNG,
                torch.einsum("pngv,pn->gv", logits_PNGV.softmax(-1), weight_PN),
                _count(ids_PNG, weight_PN, self.entries),
                weight_PN.new_zeros(()),
                weight_PN.sum(),
            )

    def _logits(self, z_PND: Tensor) -> Tensor:
        if self.hidden is not None:
            z_PND = self.activation(self.hidden(z_PND))
        logits: Tensor = self.logits(z_PND)
        return _grouped(logits, self.groups)

    def _gumbel(self, uniform: Tensor | None, like: Tensor, temperature: float) -> Tensor:
        if temperature <= 0:
            raise ValueError(f"GumbelQuantizer: temperature must be above 0, got {temperature}")
        if uniform is None or uniform.shape != like.shape:
            got = "none" if uniform is None else str(tuple(uniform.shape))
            raise ValueError(
                f"GumbelQuantizer: training needs uniform numbers of shape {tuple(like.shape)} "
                f"(quantizer.noise(seeds, frames)), got {got}; eval() chooses without noise"
            )
        return -(-uniform.to(like.dtype).clamp(min=_SMALLEST).log()).log()

    def _through(self, relaxed_PNGV: Tensor) -> Tensor:
        """(P, N, G, W) zeros that send the gradient of the relaxed choice to the logits.

        x - x.detach() is exactly 0, so the value stays the chosen entry; the codebook's own
        gradient comes through the lookup.
        """
        book_GVW = self.codebook.detach().expand(self.groups, -1, -1)
        mean_PNGW = torch.einsum("pngv,gvw->pngw", relaxed_PNGV, book_GVW)
        return mean_PNGW - mean_PNGW.detach()


class VectorQuantizer(nn.Module):
    """Nearest entry of each group, straight through (VQ-VAE, van den Oord et al. 2017).

    With `project`, latents first pass a 1x1 convolution and a group norm of G groups (the k-means
    form of vq-wav2vec); the norm takes the valid frames of a row, so that padding changes nothing.
    The codebook starts at 0.01 * normal(0, 1) and learns from its own loss alone: per frame the
    mean over Q of (e - sg(z))^2 + commitment * (sg(e) - z)^2.

    With `ema` > 0 it is a buffer and (sg(e) - z)^2 the whole loss: entries are means of the latents
    of all ranks that chose them, moving with that decay (paper, appendix A.1; `offer` and `write`).
    Before the first step each counts as chosen once. Entries chosen less often than `restart` times
    the mean become latents of the step, and count as chosen so often (Dhariwal et al. 2020).
    """

    codebook: Tensor
    chosen_CV: Tensor
    sums_CVW: Tensor

    def __init__(
        self,
        width: int,
        groups: int,
        entries: int,
        shared_codebook: bool = True,
        commitment: float = 0.25,
        project: bool = True,
        ema: float = 0.0,
        restart: float = 0.0,
    ) -> None:
        """Set up `groups` codebooks of `entries`, or one that all groups share.

        Raises:
            UserError: `width` does not split into the groups.
        """
        super().__init__()
        self.width_out, self.groups, self.entries = width, groups, entries
        self.commitment, self.ema, self.restart = commitment, ema, restart
        books = 1 if shared_codebook else groups
        start_CVW = 0.01 * torch.randn(books, entries, _entry_width(width, groups))
        if ema:
            self.register_buffer("codebook", start_CVW)
            self.register_buffer("chosen_CV", torch.ones(books, entries))
            self.register_buffer("sums_CVW", start_CVW.clone())
        else:
            self.codebook = nn.Parameter(start_CVW)
        self._offered: list[tuple[Tensor, Tensor]] = []
        self._samples: Tensor | None = None
        self._position = -1.0
        self.project = nn.Conv1d(width, width, 1, groups=groups, bias=False) if project else None
        self.norm = nn.GroupNorm(groups, width) if project else None

    def noise(self, seeds_P: Tensor, frames: int, stream: str = "gumbel") -> None:
        """None: the nearest entry is no random choice."""
        return None

    def forward(
        self,
        z_PND: Tensor,
        valid_PN: Tensor | None = None,
        temperature: float = 1.0,
        uniform_PNGV: Tensor | None = None,
    ) -> Codes:
        """Quantise latents; temperature and noise play no part."""
        with torch.autocast(z_PND.device.type, enabled=False):
            z_PND, valid_PN = _blanked(z_PND, valid_PN)
            z_PNGW = self._latents(z_PND, valid_PN)
            ids_PNG = _nearest(z_PNGW, self.codebook)
            e_PNGW = _lookup(ids_PNG, self.codebook)
            fit_PN = (e_PNGW - z_PNGW.detach()).square().mean((-1, -2)) * (not self.ema)
            stay_PN = (e_PNGW.detach() - z_PNGW).square().mean((-1, -2))
            vectors_PNGW = e_PNGW.detach() + (z_PNGW - z_PNGW.detach())
            weight_PN = valid_PN.to(z_PNGW.dtype)
            hard_GV = _count(ids_PNG, weight_PN, self.entries)
            return Codes(
                vectors_PNGW.flatten(2) * weight_PN[..., None],
                ids_PNG,
                hard_GV,
                hard_GV,
                ((fit_PN + self.commitment * stay_PN) * weight_PN).sum(),
                weight_PN.sum(),
            )

    @torch.no_grad()
    def offer(self, z_PND: Tensor, codes: Codes, valid_PN: Tensor, position: float) -> None:
        """Latents of a training step and the codes they chose, for `write`; all ranks call it.

        position: of the step; what was offered at another one and not written is forgotten, so that
        a step that is left out leaves no trace.
        """
        if not self.ema:
            return
        if position != self._position:
            self._offered, self._position = [], position
        with torch.autocast(z_PND.device.type, enabled=False):
            books, entries, width = self.codebook.shape
            z_RCW = self._latents(*_blanked(z_PND, valid_PN)).reshape(-1, books, width)
            row_R = _offset(codes.ids_PNG, books, entries).flatten()
            valid_R = valid_PN[..., None].expand_as(codes.ids_PNG).flatten()
            # a product, not an addition at places: its order of summation is always the same
            names = torch.arange(books * entries, device=row_R.device)
            chose = ((row_R == names[:, None]) & valid_R).to(z_RCW.dtype)
            packed = torch.cat([chose.sum(1, keepdim=True), chose @ z_RCW.view(-1, width)], 1)
            packed = dist.sum_over_ranks(packed).view(books, entries, 1 + width)
            if self.restart:
                self._samples = _sampled(z_RCW, valid_R.view(-1, books)[:, 0], entries)
        self._offered.append((packed[..., 0], packed[..., 1:]))

    @torch.no_grad()
    def write(self) -> None:
        """Move the averaged codebook by what the step's micro-batches have offered."""
        offered, self._offered = self._offered, []
        if not offered:
            return
        count_CV, sum_CVW = (torch.stack(parts).sum(0) for parts in zip(*offered, strict=True))
        self.chosen_CV.lerp_(count_CV, 1 - self.ema)
        self.sums_CVW.lerp_(sum_CVW, 1 - self.ema)
        total_C1 = self.chosen_CV.sum(1, keepdim=True)
        if self._samples is not None:
            mean_C1 = total_C1 / self.entries
            rare_CV = self.chosen_CV < self.restart * mean_C1
            fresh_CVW = mean_C1[..., None] * self._samples
            self.sums_CVW.copy_(torch.where(rare_CV[..., None], fresh_CVW, self.sums_CVW))
            self.chosen_CV.copy_(torch.where(rare_CV, mean_C1, self.chosen_CV))
            total_C1 = self.chosen_CV.sum(1, keepdim=True)
        share_CV = (self.chosen_CV + _EPS) / (total_C1 + self.entries * _EPS)
        self.codebook.copy_(self.sums_CVW / (share_CV * total_C1)[..., None])

    def _latents(self, z_PND: Tensor, valid_PN: Tensor) -> Tensor:
        if self.project is not None and self.norm is not None:
            z_PND = self.project(z_PND.transpose(1, 2)).transpose(1, 2)
            z_PND = _group_norm(z_PND, valid_PN, self.norm)
        return _grouped(z_PND, self.groups)


Quantizer: TypeAlias = GumbelQuantizer | VectorQuantizer


def _entry_width(width: int, groups: int) -> int:
    if width % groups:
        raise UserError(
            f"quantizer: width {width} does not split into {groups} groups; choose groups that "
            "divide it"
        )
    return width // groups


def _blanked(z_PND: Tensor, valid_PN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Latents in full precision, zeros where they are not valid, and the mask."""
    z_PND = wide(z_PND)
    if valid_PN is None:
        return z_PND, torch.ones(z_PND.shape[:2], dtype=torch.bool, device=z_PND.device)
    return torch.where(valid_PN[..., None], z_PND, torch.zeros_like(z_PND)), valid_PN


def _grouped(x_PND: Tensor, groups: int) -> Tensor:
    """(P, N, D) as (P, N, G, D / G)."""
    return x_PND.reshape(*x_PND.shape[:-1], groups, -1)


def _offset(ids_PNG: Tensor, books: int, entries: int) -> Tensor:
    """Ids as row numbers of a flattened table of `books` codebooks."""
    first_G = torch.arange(ids_PNG.shape[-1], device=ids_PNG.device) * entries
    return ids_PNG if books == 1 else ids_PNG + first_G


def _lookup(ids_PNG: Tensor, codebook: Tensor) -> Tensor:
    """(P, N, G, W) entries of one shared codebook (1, V, W) or of one each (G, V, W)."""
    books, entries, _ = codebook.shape
    return F.embedding(_offset(ids_PNG, books, entries), codebook.flatten(0, 1))


@torch.no_grad()
def _nearest(z_PNGW: Tensor, codebook: Tensor) -> Tensor:
    """(P, N, G) smallest |z - e|^2 = |z|^2 + 2 (|e|^2 / 2 - z.e), whose first part all share."""
    book_GVW = codebook.expand(z_PNGW.shape[2], -1, -1)
    product_PNGV = torch.einsum("pngw,gvw->pngv", z_PNGW, book_GVW)
    return (book_GVW.square().sum(-1) / 2 - product_PNGV).argmin(-1)


@torch.no_grad()
def _count(ids_PNG: Tensor, weight_PN: Tensor, entries: int) -> Tensor:
    """(G, V) valid frames of each entry."""
    groups = ids_PNG.shape[-1]
    place_PNG = _offset(ids_PNG, groups, entries)
    counts = weight_PN.new_zeros(groups * entries)
    counts.scatter_add_(0, place_PNG.flatten(), weight_PN[..., None].expand_as(ids_PNG).flatten())
    return counts.reshape(groups, entries)


@torch.no_grad()
def _sampled(z_RCW: Tensor, valid_R: Tensor, count: int) -> Tensor | None:
    """(C, count, W) valid latents, evenly chosen from those of all ranks; None without any."""
    rows_G = dist.gather_no_grad(valid_R.sum()[None])
    before, total = int(rows_G[: dist.rank()].sum()), int(rows_G.sum())
    place = torch.arange(count, device=z_RCW.device) * total // count - before
    own = (place >= 0) & (place < valid_R.sum())
    order = (~valid_R).to(torch.uint8).argsort(stable=True)  # the valid ones first
    found = z_RCW[order[place.clamp(0, len(order) - 1)]].masked_fill(~own[:, None, None], 0.0)
    return dist.sum_over_ranks(found).transpose(0, 1) if total else None


def _group_norm(x_PND: Tensor, valid_PN: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` with statistics over the valid frames of a row; not valid frames hold zeros."""
    x_PNGW = _grouped(x_PND, norm.num_groups)
    valid_PN11 = valid_PN[..., None, None]
    values_P111 = valid_PN11.sum(1, keepdim=True).clamp(min=1) * x_PNGW.shape[-1]
    mean_P1G1 = x_PNGW.sum((1, 3), keepdim=True) / values_P111
    centred_PNGW = torch.where(valid_PN11, x_PNGW - mean_P1G1, torch.zeros_like(x_PNGW))
    var_P1G1 = centred_PNGW.square().sum((1, 3), keepdim=True) / values_P111
    normal_PNGW = centred_PNGW * (var_P1G1 + norm.eps).rsqrt()
    affine_PND: Tensor = normal_PNGW.flatten(2) * norm.weight + norm.bias
    return affine_PND
