"""The embedding interface of a trained run; `mmssl.load(path)` makes one.

Letters in shapes: N items, D width, P pieces of a batch, T frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.data.text import Tokenizer
from mmssl.embed import separation, sources
from mmssl.embed.ahead import cores, in_order
from mmssl.embed.sources import Row
from mmssl.embed.spaces import TOWERS, Spaces
from mmssl.embed.windows import Cutter, Piece, batched, collated, joined
from mmssl.eval.load import Which, load_model
from mmssl.eval.results import weights_sha256
from mmssl.heads.dense import bin_times
from mmssl.interop import whole
from mmssl.model import Model
from mmssl.specs import RunSpec, ViewSpec
from mmssl.targets.teacher import evaluating
from mmssl.towers import time_steps
from mmssl.types import MODALITIES, Batch, UserError

T = TypeVar("T")
Pool = Literal["mean", "max"]
_DEPTH = 32  # windows that an item may have decoded ahead
# Batches that a CPU encodes at the same time, each with its share of the cores: threads of one that
# has them all wait for each other at every kernel, above all while others decode.
_BESIDE = 2


@dataclass(frozen=True)
class Window:
    """The vectors of one modality in one window of an item, by space: (D,) fp32.

    item: its number. Times are seconds on the item's clock; 0 for text. picture: (H, W, 3) uint8,
    the middle frame as the model sees it.
    """

    item: int
    modality: str
    start_s: float
    end_s: float
    vectors: dict[str, Tensor]
    picture: Tensor | None = None


class EmbeddingModel:
    """A frozen model with everything that is needed to read media.

    What is read may be {"audio": x, "video": y, "text": z} with any of the three, for one item; the
    same with lists, for several (None where an item lacks one); or a list of items, each such a
    dict, a text (str) or a file of which all streams are meant (Path). x and y are a path, bytes
    of a file, (array, rate) or a dict with `array` and `sampling_rate` or `frames` and `fps`: sound
    as (samples,) or (channels, samples), in [-1, 1], int16 or int32; frames as (frames, height,
    width, 3) uint8. One file given for audio and video is read on one clock, whose zero is its
    first frame and whose end is its last.

    Media are cut into windows of `window_s` seconds (default: what the model was trained on) every
    `hop_s` (default: the window's length); the last window ends with the media. A vector depends on
    nothing but its own window: neither on the batch nor on what else is in the list.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer | None, device: str = "cpu") -> None:
        self.model, self.tokenizer = model.to(device).eval(), tokenizer
        self.spec: RunSpec = model.spec
        self._spaces = Spaces(model, text=tokenizer is not None)

    @property
    def spaces(self) -> dict[str, tuple[str, ...]]:
        """The modalities of every space; vectors of one space can be compared."""
        return self._spaces.table

    @property
    def default_space(self) -> str:
        """The trained space with the most modalities, the first of several; else a tower's."""
        return self._spaces.default

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that can be encoded, in whatever space."""
        return tuple(m for m in MODALITIES if self.supports(m))

    def supports(self, modality: str, space: str | None = None) -> bool:
        """Whether a modality can be encoded (into a space)."""
        return any(m == modality and space in (None, s) for m, s in self._spaces.view_of)

    def audio_view(self, tower: str | None = None) -> ViewSpec:
        """How a tower, default the first that can, reads sound.

        Raises:
            UserError: there is none.
        """
        views = [v for v in self._spaces.views.values() if v.modality == "audio"]
        for view in views:
            if tower in (None, view.tower_name):
                return view
        known = ", ".join(view.tower_name for view in views) or "none"
        raise UserError(
            f"{self.spec.name}: no tower {tower or ''!r} reads sound; these do: {known}"
        )

    @cached_property
    def hash(self) -> str:
        """64 hex digits of all that vectors depend on: weights, structure, views, tokenizer.

        Vectors with different hashes must not be compared.
        """
        include = {"shared", "towers", "joints", "views", "tasks"}
        parts = whole.portable(self.spec).model_dump_json(include=include)
        words = "" if self.tokenizer is None else self.tokenizer.sha256
        facts = [weights_sha256(self.model.state_dict()), parts, words]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    # ------------------------------------------------------------ whole items

    def encode(
        self,
        inputs: Any,
        batch_size: int = 32,
        normalize: bool = True,
        window_s: float | None = None,
        hop_s: float | None = None,
        pool: Pool = "mean",
        space: str | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """One vector per item: (N, D) fp32 on the CPU, (D,) for a single item.

        Windows of a modality are pooled, then the modalities that the item has are averaged; what
        it lacks has no part in it.

        Args:
            inputs: see the class.
            batch_size: windows that are encoded at once; a CPU does two such batches at a time.
            normalize: vectors of unit length, those of windows and modalities before they are
                averaged, too.
            window_s: seconds; other windows than in training can cost quality.
            hop_s: seconds from window to window.
            pool: how windows become one vector, `mean` or `max`.
            space: one of `spaces`; default `default_space`.
            threads: that decode ahead; default one per core, 0 = none.

        Raises:
            UserError: no such space or modality in it, or an input that cannot be read (names the
                item and the modality).
        """
        if pool not in ("mean", "max"):
            raise UserError(f"pool: {pool!r} is not known; use mean or max")
        name = self._spaces.named(space)
        found: dict[int, dict[str, list[Tensor]]] = {}
        for window in self.encode_windows(
            inputs, batch_size, normalize, window_s, hop_s, [name], threads
        ):
            parts = found.setdefault(window.item, {})
            parts.setdefault(window.modality, []).append(window.vectors[name])
        unit = partial(F.normalize, dim=-1) if normalize else _same
        vectors = []
        for item in sorted(found):
            stacks = [torch.stack(found[item][m]) for m in MODALITIES if m in found[item]]
            each = [unit(x_PD.mean(0) if pool == "mean" else x_PD.amax(0)) for x_PD in stacks]
            vectors.append(unit(torch.stack(each).mean(0)))
        return vectors[0] if sources.is_single(inputs) else torch.stack(vectors)

    def encode_windows(
        self,
        inputs: Any,
        batch_size: int = 32,
        normalize: bool = True,
        window_s: float | None = None,
        hop_s: float | None = None,
        spaces: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> Iterator[Window]:
        """The vectors of every window, modality by modality, as they are made.

        Arguments and errors as of `encode`; spaces: default all that hold the modality. `inputs`
        may be endless.
        """
        asked = list(self.spaces) if spaces is None else [*map(self._spaces.named, spaces)]
        keys = self._spaces.keys(asked)
        views = list(dict.fromkeys(keys.values()))
        chosen = self._rows(inputs, {m for m, _ in keys}, asked)

        def vectors(view: str, batch: Batch) -> list[dict[str, Tensor]]:
            found = self._spaces.vectors(keys, normalize, view, batch)
            found = {space: z_PD.cpu() for space, z_PD in found.items()}
            return [{space: z_PD[p] for space, z_PD in found.items()} for p in range(batch.size)]

        for piece, found in self._run(chosen, views, vectors, batch_size, window_s, hop_s, threads):
            modality = self._spaces.views[piece.view].modality
            frames = piece.data.data if modality == "video" else None
            picture = None if frames is None else frames[len(frames) // 2]
            yield Window(piece.item, modality, piece.start_s, piece.end_s, found, picture)

    # ------------------------------------------------------------ along time

    def encode_frames(
        self,
        inputs: Any,
        batch_size: int = 8,
        window_s: float | None = None,
        hop_s: float | None = None,
        tower: str | None = None,
        threads: int | None = None,
    ) -> Any:
        """A tower's output along time, cells of one instant averaged.

        Of each instant the window is taken in which it lies further from the edge. Every item has
        audio or video, not both.

        Args:
            inputs: see the class.
            batch_size: windows that are encoded at once.
            window_s: as in `encode`.
            hop_s: as in `encode`; below `window_s` every frame sees both its neighbourhoods.
            tower: which one; default the first that reads the modality.
            threads: as in `encode`.

        Returns:
            (T, D) fp32 embeddings and (T,) fp64 times in seconds, ascending: centres of the frames
            on the item's clock. For several items a list of such pairs.

        Raises:
            UserError: as `encode`; also text, or no such tower.
        """
        layers = self.encode_layers(inputs, batch_size, window_s, hop_s, tower, threads, False)
        pairs = [(found[-1], times_T) for found, times_T in layers]
        return pairs[0] if sources.is_single(inputs) else pairs

    def encode_layers(
        self,
        inputs: Any,
        batch_size: int = 8,
        window_s: float | None = None,
        hop_s: float | None = None,
        tower: str | None = None,
        threads: int | None = None,
        layers: bool = True,
    ) -> list[tuple[list[Tensor], Tensor]]:
        """As `encode_frames`, with what enters a transformer and what each of its layers returns.

        Returns:
            For every item a list of (T, D), the tower's own output last, and their times (T,).
        """
        views = self._media_views(tower)
        held: set[str] = {self._spaces.views[v].modality for v in views}
        chosen = self._rows(
            inputs, held, [TOWERS + self._spaces.views[v].tower_name for v in views]
        )
        frames = partial(self._frames, layers)
        parts: dict[int, list[tuple[Piece, list[Tensor], Tensor]]] = {}
        for piece, (found, times_T) in self._run(
            sources.of_one(chosen), views, frames, batch_size, window_s, hop_s, threads
        ):
            parts.setdefault(piece.item, []).append((piece, found, times_T + piece.start_s))
        # windows of another length are in other batches, which come in their own order
        return [joined(sorted(parts[i], key=lambda part: part[0].start_s)) for i in sorted(parts)]

    def _media_views(self, tower: str | None) -> list[str]:
        media = {n: v for n, v in self._spaces.views.items() if v.modality != "text"}
        by_modality = {v.modality: n for n, v in reversed(media.items())}
        if tower is None:
            return list(by_modality.values())
        views = [name for name, view in media.items() if view.tower_name == tower]
        if not views:
            known = ", ".join(sorted({view.tower_name for view in media.values()})) or "none"
            raise UserError(f"tower: no {tower!r} that reads audio or video; there are: {known}")
        return views[:1]

    def _frames(self, layers: bool, view: str, batch: Batch) -> list[tuple[list[Tensor], Tensor]]:
        """(layers, times) of each row of a batch of one view."""
        passes = self.model.passes(batch)
        tower, tokens = passes.tower(view), passes.tokens(view)
        x_PTD, pad_PT = time_steps(tokens)
        stack = [x_PTD]
        if layers and hasattr(tower, "layers"):
            hidden = tower.layers(tokens.view)[0]  # type: ignore[operator]
            stack = [time_steps(replace(tokens, x_PND=x))[0] for x in hidden] + stack
        per_bin = tokens.stem_rate_hz / tokens.rate_hz
        times_PT = bin_times(tokens, x_PTD.shape[1], per_bin, tower.first_centre()).double().cpu()
        return [
            ([x[p][~pad_T].float().cpu() for x in stack], times_PT[p][~pad_T.cpu()])
            for p, pad_T in enumerate(pad_PT)
        ]

    def separate(self, inputs: Any) -> Any:
        """(M, S) sounds that a `separate` task finds in a whole item; a list for several items.

        At the rate of the task's view, `audio_view().hz`. Errors as of `encode`.
        """
        rows = self._rows(inputs, {"audio"}, ["a mixture"])
        found = separation.separated(self.model, self._spaces.views, rows)
        return found[0] if sources.is_single(inputs) else found

    # ------------------------------------------------------------ comparing

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, M) cosines of (N, D) and (M, D) vectors of one space; a single vector is one row."""
        x, y = (F.normalize(_rows_of(z), dim=-1) for z in (a, b))
        return x @ y.T

    def similarity_pairwise(self, a: Tensor, b: Tensor) -> Tensor:
        """(N,) cosines of paired rows."""
        return F.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b), dim=-1)

    # ------------------------------------------------------------ running

    def _rows(self, inputs: Any, held: set[str], asked: Sequence[str]) -> Iterator[Row]:
        """Checked rows.

        Raises:
            UserError: none at all, or a modality that the spaces do not hold.
        """
        for row in sources.counted(sources.rows(inputs)):
            for modality in row.sources:
                if modality not in held:
                    raise UserError(
                        f"{row.name}, {modality}: is not in {' and '.join(asked)} of the model "
                        f"{self.spec.name}; its spaces are {self._spaces.told}"
                    )
            yield row

    def _run(
        self,
        rows: Iterable[Row],
        views: Sequence[str],
        function: Callable[[str, Batch], list[T]],
        batch_size: int,
        window_s: float | None,
        hop_s: float | None,
        threads: int | None,
    ) -> Iterator[tuple[Piece, T]]:
        """What a function makes of the batches of all pieces, batch by batch."""
        for name, value in (("batch_size", batch_size), ("window_s", window_s), ("hop_s", hop_s)):
            if value is not None and value <= 0:
                raise UserError(f"{name}: must be above 0, found {value}")
        cut = {} if window_s is None else {"crop_s": window_s}
        cutter = Cutter(
            {name: self._spaces.views[name].model_copy(update=cut) for name in views},
            self.tokenizer,
            self._spaces.loose,
            hop_s or 0.0,
        )
        jobs = (partial(cutter.pieces, i, row) for i, row in enumerate(rows))
        ahead = in_order(jobs, cores() if threads is None else threads, batch_size, _DEPTH)
        batches, usual = batched(ahead, batch_size), torch.get_num_threads()
        device = next(self.model.parameters()).device

        def encoded(pieces: list[Piece]) -> Iterator[tuple[Piece, T]]:
            view = pieces[0].view
            with torch.inference_mode():
                found = function(view, collated(pieces, cutter.views[view]).to(device))
            return zip(pieces, found, strict=True)

        some = list(islice(batches, min(_BESIDE, usual) if device.type == "cpu" else 1))
        pool, share = len(some) if len(some) > 1 else 0, usual // max(1, len(some))
        with evaluating(self.model):
            each = (partial(encoded, pieces) for pieces in chain(some, batches))
            yield from in_order(each, pool, 1, batch_size, share)


def load(path: str | Path, which: Which = "ema", device: str = "cpu") -> EmbeddingModel:
    """The embedding interface of a run folder, a checkpoint, or a folder of `mmssl export`.

    which: weights of a run, see `mmssl.eval.load.load_model`.

    Raises:
        UserError: nothing there that can be loaded.
    """
    if whole.is_folder(Path(path)):
        return EmbeddingModel(*whole.read(Path(path)), device)
    model, _, tokenizer = load_model(path, which)
    return EmbeddingModel(model, tokenizer, device)


def _same(x: Tensor) -> Tensor:
    return x


def _rows_of(vectors: Tensor) -> Tensor:
    x = torch.as_tensor(vectors)
    return x[None] if x.ndim == 1 else x
