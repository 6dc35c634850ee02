"""Documents to segments: [CLS] A [SEP] (RoBERTa) or [CLS] A [SEP] B [SEP] (BERT, ALBERT).

A document is the list of captions of a sample, in their order. Everything that is drawn for a row
comes from the row's own seed; only whose sentences a foreign B consists of depends on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Protocol

import torch
from torch import Tensor

from mmssl import rng
from mmssl.types import Pair, View
from mmssl.views.plan import Cut

_MARKERS = {"single": 2, "next": 3, "order": 3}

Ids = list[int]


class Encoder(Protocol):
    """The part of a tokenizer that segments need; begin and end serve as [CLS] and [SEP]."""

    @property
    def special(self) -> dict[str, int]:
        """Ids of `bos` and `eos`, among others."""
        ...

    def encode(self, text: str, length: int) -> list[int]:
        """Ids of a text, the last of them the end marker."""
        ...


def cut_segments(captions: Sequence[str], cut: Cut, tokenizer: Encoder) -> list[View]:
    """One view of a document, none where it has no text.

    A document that is longer than the view begins at a random sentence that leaves enough. The pair
    is broken between two sentences at random; a document of one sentence is broken in its middle.
    With the probability `short` the view has room for a random smaller number of ids.
    """
    spec, seed = cut.spec.segments, cut.seed
    assert spec is not None
    whole = cut.spec.length - _MARKERS[spec.pairing]
    captions_ids = (tokenizer.encode(text, whole + 1)[:-1] for text in captions)
    sentences = _opened([ids for ids in captions_ids if ids], whole, spec.pairing, seed)
    if not sentences:
        return []
    is_short = _draw(seed, "short", 1 << 24) < spec.short * (1 << 24)
    room = 2 + _draw(seed, "room", whole - 1) if is_short else whole
    ends = (tokenizer.special["bos"], tokenizer.special["eos"])
    if spec.pairing == "single" or len(sentences) == 1:
        return [View(_ids([ends[0]], _flat(sentences)[:room], [ends[1]]), 0.0, 0.0, seed)]
    pair = _break(sentences, room, whole, seed, ends)
    a, b = _trimmed(pair.first, pair.second, room)
    if spec.pairing == "next":
        return [replace(_view(a, b, ends, seed, 0), pair=pair)]
    swapped = _draw(seed, "order", 2)
    return [_view(b, a, ends, seed, 1) if swapped else _view(a, b, ends, seed, 0)]


def with_strangers(views: Sequence[View], sources: Sequence[str]) -> list[View]:
    """Half of the pairs get their second segment from another document (BERT's next sentence).

    The coin is the row's own. The other document is a random one of the same batch with another
    source; where there is none, the pair stays as it is.

    Args:
        views: one view of several rows; those without a `pair` are left alone.
        sources: the recording each row comes from.
    """
    out = []
    for i, view in enumerate(views):
        j = _stranger(i, views, sources) if view.pair and _draw(view.seed, "order", 2) else None
        if view.pair is None or j is None:
            out.append(view)
            continue
        other = views[j].pair
        assert other is not None
        a, b = _trimmed(view.pair.first, other.lent, view.pair.room)
        out.append(_view(a, b, view.pair.ends, view.seed, 1))
    return out


def _stranger(i: int, views: Sequence[View], sources: Sequence[str]) -> int | None:
    """A random row of another source that has a pair; None without one."""
    count = len(views)
    first = _draw(views[i].seed, "stranger", max(1, count - 1))
    for k in range(count - 1):
        j = (i + 1 + (first + k) % (count - 1)) % count
        if sources[j] != sources[i] and views[j].pair is not None:
            return j
    return None


def _opened(sentences: list[Ids], whole: int, pairing: str, seed: int) -> list[Ids]:
    """The sentences from the one at which the view begins; at least two for a pair, if possible.

    What is left fills the view wherever the document can.
    """
    least = 1 if pairing == "single" else 2
    if len(sentences) == 1 and least == 2:
        middle = (len(sentences[0]) + 1) // 2
        sentences = [s for s in (sentences[0][:middle], sentences[0][middle:]) if s]
    behind = list(accumulate(map(len, reversed(sentences))))[::-1]  # ids from a sentence on
    starts = sum(ids >= whole for ids in behind[: len(behind) + 1 - least])
    return sentences[_draw(seed, "start", starts) :] if starts > 1 else sentences


def _break(
    sentences: Sequence[Ids], room: int, whole: int, seed: int, ends: tuple[int, int]
) -> Pair:
    """The pair around a random border of the sentences that fill the room.

    What is lent to other rows must not betray itself by its length: of a document that fills the
    view it fills it, too, of a shorter one it is the second part.
    """
    filling, total = 0, 0
    while filling < len(sentences) and (total < room or filling < 2):
        total += len(sentences[filling])
        filling += 1
    border = 1 + _draw(seed, "border", filling - 1)
    first, second, opened = (_flat(s) for s in (sentences[:border], sentences[border:], sentences))
    lent = opened if len(opened) >= whole else second
    return Pair(first, second[:whole], lent[:whole], room, ends)


def _trimmed(a: Ids, b: Ids, room: int) -> tuple[Ids, Ids]:
    """Both segments with at most `room` ids: half each where neither is shorter.

    A loses its beginning and B its end, so that what is left are neighbours. (BERT drops ids of the
    longer one at a random end.)
    """
    keep_b = min(len(b), max(room - len(a), room // 2))
    keep_a = min(len(a), room - keep_b)
    return a[len(a) - keep_a :], b[:keep_b]


def _view(a: Ids, b: Ids, ends: tuple[int, int], seed: int, order: int) -> View:
    cls, sep = ends
    data = _ids([cls], a, [sep], b, [sep])
    return View(data, 0.0, 0.0, seed, split=len(a) + 2, order=order)


def _flat(sentences: Sequence[Ids]) -> Ids:
    return list(chain.from_iterable(sentences))


def _ids(*parts: Sequence[int]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)


def _draw(seed: int, name: str, count: int) -> int:
    """A whole number uniform in [0, count)."""
    return rng.seed_of(seed, name) % count
