"""The shared encoder: one stack of layers that every modality may run through.

B rows, N tokens, D width, H heads, L layers. Pre-norm by default (VATT): x + attention(norm(x)),
then x + mlp(norm(x)), with a final norm. Weights may be kept per modality: all LayerNorms
(`norms_for`) and the feed-forward of the first layers (`ffn_for`, `ffn_layers`); attention is
always shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmssl.backbones.attention import Attention, key_mask, past_mask
from mmssl.backbones.conformer import ConformerBlock, ConvOptions
from mmssl.backbones.dropout import Dropout, DropPath
from mmssl.backbones.layers import FeedForward, LayerOptions, PerModality
from mmssl.backbones.relative import GridBias, RelativeBias
from mmssl.types import UserError

RELATIVE_USES = ("first", "all", "gated")
LAYERS = ("transformer", "conformer")
TAPS = ("layer", "ffn")


class Block(nn.Module):
    """One layer: attention and feed-forward, each with its norm, residual and dropout."""

    def __init__(
        self, options: LayerOptions, ffn_for: Sequence[str] = (), drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.post_norm = options.post_norm
        self.norm1 = options.norm()
        self.attention = Attention(options)
        self.norm2 = options.norm()
        self.ffn = PerModality(ffn_for, FeedForward, options)
        self.dropout = options.branch_dropout()
        self.path = DropPath(drop_path)
        self.scale1_D: nn.Parameter | None = None
        self.scale2_D: nn.Parameter | None = None
        if options.layer_scale:
            self.scale1_D = nn.Parameter(torch.full((options.width,), options.layer_scale))
            self.scale2_D = nn.Parameter(torch.full((options.width,), options.layer_scale))

    def forward(
        self,
        x_BND: Tensor,
        mask: Tensor | None = None,
        modality: str | None = None,
        bias: Tensor | None = None,
        tap: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, D), same shape out; mask and bias as in `Attention`.

        tap: also return the feed-forward's output, before dropout and residual.
        """
        seen = x_BND if self.post_norm else self.norm1(x_BND, modality)
        x_BND = x_BND + self._branch(self.attention(seen, mask, bias), self.scale1_D)
        if self.post_norm:
            x_BND = self.norm1(x_BND, modality)
        ffn = self.ffn(x_BND if self.post_norm else self.norm2(x_BND, modality), modality)
        x_BND = x_BND + self._branch(ffn, self.scale2_D)
        if self.post_norm:
            x_BND = self.norm2(x_BND, modality)
        return (x_BND, ffn) if tap else x_BND

    def _branch(self, y_BND: Tensor, scale_D: Tensor | None) -> Tensor:
        y_BND = self.dropout(y_BND)
        out: Tensor = self.path(y_BND if scale_D is None else y_BND * scale_D)
        return out


class Transformer(nn.Module):
    """Encoder of (B, N, D) tokens.

    Size: heads x head_size need not equal the width; heads 0 means width / head_size. hidden 0
    means 4 x width. norms_for, ffn_for: modalities with LayerNorms / feed-forwards of their own
    (empty = shared), the latter in the first `ffn_layers` layers. share_layers: one layer, used L
    times (ALBERT): it is registered once and its gradient is the sum over depths. checkpointing
    recomputes each layer in the backward pass: memory of one layer instead of all.

    Norms: post_norm puts them behind the residuals (BERT, wav2vec 2.0 BASE). input_norm: one before
    the first layer. final_norm: one behind the last; None = only a pre-norm transformer has it,
    since post-norm and Conformer layers end in one. layer_scale: see `LayerOptions`.

    Relative positions: relative_buckets > 0 makes T5's table, relative_grid one of a fixed grid
    behind `relative_front` tokens (BEiT). relative_use: `first` layer only, `all` layers, or all
    and `gated` by each (WavLM: 320 buckets, distance 800).

    Dropout: `dropout` of residual branches; attention_dropout and activation_dropout follow it
    where None. It is also applied before the first layer (input_dropout) where there is an
    input_norm, else to the output (output_dropout), unless these are given. drop_path:
    rate of the last layer, growing linearly from 0 at the first.

    layer_drop: probability that a layer is left out of a forward pass, for the whole batch; never
    the first one with keep_first (WavLM). A layer left out is run and its result thrown away: its
    parameters then get gradients of zero and every rank runs the same modules, without which ZeRO
    waits for gradients or shards that never come. It saves no time.

    causal: a token looks at those before it and at itself alone.

    layer: `transformer` or `conformer`; the latter reads conv_kernels (one number, or one per
    layer), conv_first, conv_norm and conv_bias as in `ConvOptions`.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int = 0,
        head_size: int = 64,
        hidden: int = 0,
        dropout: float = 0.0,
        norms_for: Sequence[str] = (),
        ffn_for: Sequence[str] = (),
        ffn_layers: int = 0,
        post_norm: bool = False,
        relative_buckets: int = 0,
        relative_distance: int = 64,
        checkpointing: bool = False,
        eps: float = 1e-6,
        *,
        attention_dropout: float | None = None,
        activation_dropout: float | None = None,
        input_dropout: float | None = None,
        output_dropout: float | None = None,
        layer_drop: float = 0.0,
        keep_first: bool = False,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
        share_layers: bool = False,
        input_norm: bool = False,
        final_norm: bool | None = None,
        init: str = "xavier",
        relative_use: str = "first",
        relative_grid: Sequence[int] = (),
        relative_front: int = 0,
        layer: str = "transformer",
        conv_kernels: int | Sequence[int] = 31,
        conv_first: bool = False,
        conv_norm: str = "group",
        conv_bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        heads = heads or width // head_size
        _check_size(width, layers, heads, head_size, ffn_for, ffn_layers)
        self.width, self.layers, self.checkpointing = width, layers, checkpointing
        self.causal = causal
        self.layer_drop, self.keep_first, self.relative_use = layer_drop, keep_first, relative_use
        self.relative = _relative(
            heads, (relative_buckets, relative_distance), relative_grid, relative_front
        )
        options = LayerOptions(
            width,
            hidden or 4 * width,
            heads,
            head_size,
            dropout,
            dropout if attention_dropout is None else attention_dropout,
            dropout if activation_dropout is None else activation_dropout,
            tuple(norms_for),
            post_norm,
            eps,
            init,
            gated=_is_gated(relative_use, self.relative),
            layer_scale=layer_scale,
        )
        own = [tuple(ffn_for) if i < ffn_layers else () for i in range(layers)]
        if layer == "conformer":
            _check_conformer(post_norm, layer_scale, drop_path, causal)
            convs = _convs(layers, conv_kernels, conv_first, conv_norm, conv_bias)
            self.blocks = _stack(ConformerBlock, options, own, convs, share_layers)
        elif layer == "transformer":
            paths = [drop_path * i / max(1, layers - 1) for i in range(layers)]
            self.blocks = _stack(Block, options, own, paths, share_layers)
        else:
            raise UserError(f"layer: {layer!r} is not known; use one of {', '.join(LAYERS)}")
        self.input_norm = options.norm() if input_norm else None
        if final_norm is None:
            final_norm = not post_norm and layer == "transformer"
        self.norm = options.norm() if final_norm else None
        first, last = (dropout, 0.0) if input_norm else (0.0, dropout)
        self.input_dropout = Dropout(first if input_dropout is None else input_dropout)
        self.dropout = Dropout(last if output_dropout is None else output_dropout)

    def forward(
        self,
        x_BND: Tensor,
        pad_BN: Tensor | None = None,
        modality: str | None = None,
        return_hidden: bool = False,
        tap: str = "layer",
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode; returns the normed output (B, N, D) and, if asked, one tensor per layer.

        pad_BN: True where a token must be ignored. Its content influences nothing; its output is
        finite and meaningless. hidden[i]: with tap `layer` the output of layer i, before the final
        norm; with `ffn` that of its (last) feed-forward, before dropout and residual (data2vec's
        targets). Empty unless `return_hidden`.
        """
        if pad_BN is not None:
            # a non-finite padded value would reach others through 0 * nan
            x_BND = x_BND.masked_fill(pad_BN[..., None], 0.0)
        look = None if pad_BN is None else key_mask(pad_BN)
        if self.causal:
            past = past_mask(x_BND.shape[1], x_BND.device)
            look = past if look is None else look & past
        if self.input_norm is not None:
            x_BND = self.input_norm(x_BND, modality)
        x_BND = self.input_dropout(x_BND)
        bias = None if self.relative is None else self.relative(x_BND.shape[1]).to(x_BND.dtype)
        keep = self._kept(x_BND.device)
        hidden: list[Tensor] = []
        ffn = return_hidden and _known_tap(tap) == "ffn"
        for i, block in enumerate(self._depths()):
            near = bias if i == 0 or self.relative_use != "first" else None
            new = self._run(block, x_BND, look, modality, near, ffn)
            if ffn:
                new, tapped = new
                hidden.append(tapped)
            x_BND = new if keep is None else torch.where(keep[i], new, x_BND)
            if return_hidden and not ffn:
                hidden.append(x_BND)
        if self.norm is not None:
            x_BND = self.norm(x_BND, modality)
        return self.dropout(x_BND), hidden

    def _depths(self) -> Iterator[nn.Module]:
        """The layer of every depth; a shared one comes again and again."""
        return (self.blocks[i % len(self.blocks)] for i in range(self.layers))

    def _run(self, block: nn.Module, *args: object) -> Any:
        # results come back as values: ZeRO-3's hooks hand a layer copies of lists and dictionaries
        if self.checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _kept(self, device: torch.device) -> Tensor | None:
        """(L,) bool: the layers that count in this pass; None when all do."""
        if not self.training or self.layer_drop == 0.0:
            return None
        keep = torch.rand(self.layers, device=device) >= self.layer_drop
        if self.keep_first:
            keep[0] = True
        return keep


def _check_size(
    width: int, layers: int, heads: int, head_size: int, ffn_for: Sequence[str], ffn_layers: int
) -> None:
    if heads < 1 or layers < 1:
        raise UserError(
            f"transformer: width {width}, head_size {head_size}, {heads} heads, {layers} "
            "layers: need at least one layer and one head; lower head_size or give heads"
        )
    if bool(ffn_for) != (ffn_layers > 0) or ffn_layers > layers:
        raise UserError(
            f"transformer: ffn_layers {ffn_layers} of {layers} layers with ffn_for "
            f"{list(ffn_for)}; give both, and no more than there are layers"
        )


def _check_conformer(post_norm: bool, layer_scale: float, drop_path: float, causal: bool) -> None:
    if post_norm or layer_scale or drop_path or causal:
        raise UserError(
            "layer: a conformer has its own norms, convolves both ways and knows no post_norm, "
            "layer_scale, drop_path or causal"
        )


def _is_gated(use: str, table: nn.Module | None) -> bool:
    if use not in RELATIVE_USES:
        raise UserError(
            f"relative_use: {use!r} is not known; use one of {', '.join(RELATIVE_USES)}"
        )
    if use != "first" and table is None:
        raise UserError(f"relative_use: {use!r} needs relative_buckets or relative_grid")
    return use == "gated"


def _known_tap(tap: str) -> str:
    if tap not in TAPS:
        raise UserError(f"tap: {tap!r} is not known; use one of {', '.join(TAPS)}")
    return tap


def _relative(
    heads: int, buckets: tuple[int, int], grid: Sequence[int], front: int
) -> RelativeBias | GridBias | None:
    if grid and buckets[0]:
        raise UserError(
            f"relative_buckets {buckets[0]} and relative_grid {list(grid)} exclude each other"
        )
    if grid:
        return GridBias(heads, grid, front)
    return RelativeBias(heads, *buckets) if buckets[0] else None


def _convs(
    layers: int, kernels: int | Sequence[int], first: bool, norm: str, bias: bool
) -> list[ConvOptions]:
    kernels = [kernels] * layers if isinstance(kernels, int) else list(kernels)
    if len(kernels) != layers:
        raise UserError(f"conv_kernels: {len(kernels)} kernels for {layers} layers; give one each")
    return [ConvOptions(kernel, first, norm, bias) for kernel in kernels]


def _stack(
    make: Callable[..., nn.Module],
    options: LayerOptions,
    own: Sequence[tuple[str, ...]],
    rest: Sequence[object],
    share: bool,
) -> nn.ModuleList:
    """The layers, or the one that all depths share."""
    plans = list(zip(own, rest, strict=True))
    if share and any(plan != plans[0] for plan in plans):
        raise UserError(
            "share_layers: one layer serves all depths, so ffn_layers must be 0 or all, drop_path "
            "0 and conv_kernels equal"
        )
    return nn.ModuleList(make(options, *plan) for plan in (plans[:1] if share else plans))
