"""`mmssl eval abx RUN label=FIELD [speaker=FIELD]`: are two of a kind closer than two of another?

Schatz et al. 2013; as the Zero Resource challenges average it. Chance is an error of 0.5.

Letters in shapes: T and U frames of two items, D width, P pairs of items.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tqdm import tqdm

from mmssl.eval.bootstrap import interval
from mmssl.eval.features import SIGNAL
from mmssl.eval.items import Metrics
from mmssl.eval.results import Results, interval_of, plot
from mmssl.eval.retrieval import normalize
from mmssl.eval.session import RANDOM, TRAINED, Session
from mmssl.eval.spans import SpanSpec, labelled_clips
from mmssl.types import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Pair = tuple[str, str]

_CELLS = 2**22  # of the tables of pairs computed at a time, 8 bytes each, about six tables


class Options(SpanSpec):
    """What can be set behind `mmssl eval abx RUN`."""

    speaker: str = ""  # field of the clips' meta; empty = all clips are of one speaker
    max_items: int = Field(10, gt=1)  # of one class, context and speaker; more are drawn from


@dataclass(frozen=True)
class Item:
    """A token: its class, context and speaker."""

    name: str
    context: str
    speaker: str


def evaluate(session: Session) -> Results:
    """Results of the suite.

    Raises:
        UserError: no such field, no modality, or no class with two tokens beside another class.
    """
    options = cast("Options", session.options)
    unlabelled: list[str] = []
    items, frames, metas, empty = collect(session, options, unlabelled)
    kept = drawn(items, options.max_items, options.seed)
    made: dict[str, Metrics] = {}
    for name, tokens in frames.items():
        few = [tokens[i] for i in kept]
        made[name] = abx([items[i] for i in kept], few, session, name)
    found = session.facts("abx", metas)
    facts = {"n": len(kept), "tokens": len(items), "without_frames": empty, "chance": 0.5}
    found["abx"] = {**made[TRAINED], **facts, "unlabelled": len(unlabelled)}
    found["trivial"] = {"abx": {SIGNAL: made[SIGNAL]}}
    if RANDOM in made:
        found["random_encoder"] = {"abx": made[RANDOM]}
    x = [kind for kind in ("within", "across") if made[TRAINED][kind] is not None]
    lines = {name: [part[kind]["error"] for kind in x] for name, part in made.items()}
    lines["chance"] = [0.5] * len(x)
    bounds = {name: [interval_of(part[kind], "error") for kind in x] for name, part in made.items()}
    found["plots"] = [plot("ABX error (lower is better)", "speakers", x, lines, bounds)]
    return found


def collect(
    session: Session, options: Options, unlabelled: list[str]
) -> tuple[list[Item], dict[str, list[Floats]], list[Mapping[str, Any]], int]:
    """Tokens, their frames (T, D) by model, metas of their clips, tokens too short for a frame.

    `unlabelled` gets the keys of the clips without class, context or speaker.
    """
    items: list[Item] = []
    frames: dict[str, list[Floats]] = {}
    metas: list[Mapping[str, Any]] = []
    empty = 0
    for clip, spans in labelled_clips(session, options, unlabelled, ("context", "speaker")):
        metas.append(clip.meta)
        speaker = str(clip.meta.get(options.speaker, ""))
        for span in spans:
            cuts = {
                name: normalize(x_TD[span.holds(len(x_TD), clip.rate_hz[name], clip.first_s[name])])
                for name, x_TD in clip.frames.items()
            }
            if not all(len(cut) for cut in cuts.values()):
                empty += 1
                continue
            items.append(Item(span.name, span.context, speaker))
            for name, cut in cuts.items():
                frames.setdefault(name, []).append(cut)
    return items, frames, metas, empty


def drawn(items: Sequence[Item], most: int, seed: int) -> list[int]:
    """At most so many numbers of each class, context and speaker."""
    groups: dict[Item, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[item].append(i)
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(numbers)[:most] for numbers in groups.values()]
    return sorted(int(i) for part in kept for i in part)


# --- the score


def abx(
    items: Sequence[Item], frames: Sequence[Floats], session: Session | None = None, title: str = ""
) -> Metrics:
    """Error within and across speakers; None where no triple exists.

    frames: (T, D) unit rows of every token. For classes a != b of one context: A and X of a, B of
    b; within: all of one speaker; across: X of another one than A and B. The share of triples in
    which X is nearer to B (ties one half) is averaged over tokens, then over speakers, contexts
    and pairs of classes, symmetrised.

    Raises:
        UserError: there is no triple at all.
    """
    distances = _Distances(items, frames, title)
    tables: dict[str, dict[Pair, dict[str, list[float]]]] = {}
    for kind in ("within", "across"):
        tables[kind] = defaultdict(lambda: defaultdict(list))
        for pair, context, error in _cells(items, distances, kind == "across"):
            tables[kind][pair][context].append(error)
    if not any(tables.values()):
        raise UserError(
            "abx: no context holds a class with two tokens and a token of another class of the "
            "same speaker; name other fields with label=, context= and speaker="
        )
    return {kind: _averaged(table, session) for kind, table in tables.items()}


def _averaged(table: Mapping[Pair, Mapping[str, list[float]]], session: Session | None) -> Any:
    """Mean over speakers, contexts, both orders of a pair, pairs; None without any."""
    if not table:
        return None
    both: dict[Pair, list[float]] = defaultdict(list)
    for (a, b), contexts in table.items():
        both[min(a, b), max(a, b)].append(float(np.mean([np.mean(x) for x in contexts.values()])))
    errors = [float(np.mean(x)) for x in both.values()]
    result: Metrics = {"error": float(np.mean(errors)), "pairs": len(errors)}
    if session is not None and session.options.resamples:
        bounds = interval(errors, None, "mean", session.options.resamples, session.options.seed)
        result["ci"] = {"error": list(bounds)}
    return result


def _cells(
    items: Sequence[Item], distances: _Distances, across: bool
) -> Iterator[tuple[Pair, str, float]]:
    """((a, b), context, error) of every speaker, or pair of speakers."""
    groups: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, item in enumerate(items):
        groups[item.context, item.speaker][item.name].append(i)
    for (context, speaker), classes in groups.items():
        others = [s for c, s in groups if c == context and s != speaker] if across else [speaker]
        for a, of_a in classes.items():
            for b, of_b in classes.items():
                for other in others if a != b else ():
                    of_x = groups[context, other].get(a, [])
                    if of_x and (across or len(of_a) > 1):
                        yield (a, b), context, distances.error(of_x, of_a, of_b)


class _Distances:
    """Distances of the tokens of each context, all computed at once."""

    def __init__(self, items: Sequence[Item], frames: Sequence[Floats], title: str) -> None:
        contexts: dict[str, list[int]] = defaultdict(list)
        for i, item in enumerate(items):
            contexts[item.context].append(i)
        self.place = {i: k for numbers in contexts.values() for k, i in enumerate(numbers)}
        self.context = {i: item.context for i, item in enumerate(items)}
        pairs = sum(len(n) * (len(n) - 1) // 2 for n in contexts.values())
        with tqdm(total=pairs, desc=f"ABX, {title}", unit="pair", disable=None) as bar:
            self.tables = {
                context: all_distances([frames[i] for i in numbers], bar.update)
                for context, numbers in contexts.items()
            }

    def error(self, of_x: list[int], of_a: list[int], of_b: list[int]) -> float:
        """Share of triples in which X is nearer to B than to A, X itself left out as A."""
        table = self.tables[self.context[of_x[0]]]
        x, a, b = ([self.place[i] for i in part] for part in (of_x, of_a, of_b))
        to_a = table[np.ix_(x, a)][:, :, None]
        to_b = table[np.ix_(x, b)][:, None]
        wrong_XAB = (to_a > to_b) + 0.5 * (to_a == to_b)
        other_XA = np.asarray(x)[:, None] != np.asarray(a)[None]
        return float(wrong_XAB[other_XA].mean())


def all_distances(
    frames: Sequence[Floats], done: Callable[[int], object] = lambda pairs: None
) -> Floats:
    """(n, n) distances of all tokens, pairs of like length together; `done` hears how many."""
    n = len(frames)
    pairs = np.stack(np.triu_indices(n, 1), axis=1)
    lengths = np.asarray([len(x) for x in frames])
    pairs = pairs[np.lexsort((lengths[pairs[:, 1]], lengths[pairs[:, 0]]))]
    table, size = np.zeros((n, n)), max(1, _CELLS // max(lengths, default=1) ** 2)
    for begin in range(0, len(pairs), size):
        few = pairs[begin : begin + size]
        found = dtw([frames[i] for i in few[:, 0]], [frames[j] for j in few[:, 1]])
        table[few[:, 0], few[:, 1]] = table[few[:, 1], few[:, 0]] = found
        done(len(few))
    return table


def dtw(a: Sequence[Floats], b: Sequence[Floats]) -> Floats:
    """(P,) mean angular distance (0 to 1) along the best path of dynamic time warping.

    a, b: (T, D) and (U, D) unit rows of each pair. The path with the least sum counts, of equal
    ones the more diagonal; its sum is divided by its length. The mean is rounded to 6 decimals:
    near 0 arccos makes 1e-8 of the last bit of a cosine, and equal distances must be ties.
    """
    x, y = _padded(a), _padded(b)
    cost_PTU = np.arccos(np.clip(x @ y.transpose(0, 2, 1), -1, 1)) / np.pi
    pairs, steps, others = cost_PTU.shape
    total = np.full((steps + 1, others + 1, pairs), np.inf)
    length = np.zeros((steps + 1, others + 1, pairs))
    total[0, 0] = 0.0
    for diagonal in range(2, steps + others + 1):  # its cells do not depend on each other
        i = np.arange(max(1, diagonal - others), min(steps, diagonal - 1) + 1)
        j = diagonal - i
        before = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        sums = np.stack([total[place] for place in before])
        best = sums.argmin(axis=0)[None]
        total[i, j] = cost_PTU[:, i - 1, j - 1].T + np.take_along_axis(sums, best, 0)[0]
        counts = np.stack([length[place] for place in before])
        length[i, j] = 1 + np.take_along_axis(counts, best, 0)[0]
    last = ([len(t) for t in a], [len(u) for u in b], np.arange(pairs))
    return np.round(total[last] / length[last], 6)


def _padded(tokens: Sequence[Floats]) -> Floats:
    out = np.zeros((len(tokens), max(len(x) for x in tokens), tokens[0].shape[1]))
    for row, x in zip(out, tokens, strict=True):
        row[: len(x)] = x
    return out
