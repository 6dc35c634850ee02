"""Documents to segments: markers, borders, orders, foreign sentences, room."""

from collections import Counter
from itertools import chain

import pytest
import torch

from mmssl.specs import ViewSpec
from mmssl.views import clip as cutting
from mmssl.views.plan import Cut
from mmssl.views.segments import cut_segments, with_strangers

CLS, SEP = 2, 3


class Words:
    """Words are numbers; the id of word n is n."""

    special = {"pad": 0, "unk": 1, "bos": CLS, "eos": SEP, "mask": 4}

    def encode(self, text, length):
        return [*map(int, text.split()[: length - 1]), SEP]


def document(k, sentences=4, words=5):
    """Sentences of consecutive numbers; documents of different k share none."""
    first = 1000 * (k + 1)
    numbers = iter(range(first, first + sentences * words))
    return [" ".join(str(next(numbers)) for _ in range(words)) for _ in range(sentences)]


def cut(captions, pairing, seed=0, length=32, short=0.0):
    segments = {"pairing": pairing, "short": short}
    spec = ViewSpec(modality="text", length=length, segments=segments)
    return cut_segments(captions, Cut("text", spec, 0.0, 0.0, seed), Words())


def split(view):
    """[CLS] A [SEP] B [SEP] to A and B."""
    ids = view.data.tolist()
    assert (ids[0], ids[view.split - 1], ids[-1]) == (CLS, SEP, SEP)
    return ids[1 : view.split - 1], ids[view.split : -1]


def text_of(captions):
    return [int(word) for caption in captions for word in caption.split()]


def test_a_single_segment_is_the_document_between_its_markers():
    (view,) = cut(document(0), "single")
    assert view.data.tolist() == [CLS, *text_of(document(0)), SEP]
    assert (view.split, view.order, view.pair) == (0, -1, None)
    assert view.data.dtype == torch.int64


def test_a_pair_is_broken_between_two_sentences_anywhere():
    borders = Counter()
    for seed in range(300):
        (view,) = cut(document(0), "next", seed)
        a, b = split(view)
        assert a + b == text_of(document(0))
        assert view.order == 0
        borders[len(a)] += 1
    assert set(borders) == {5, 10, 15}
    assert min(borders.values()) > 70


def test_swapping_flips_the_label_and_keeps_the_ids():
    swapped = 0
    for seed in range(300):
        (view,) = cut(document(0), "order", seed)
        a, b = split(view)
        assert (b + a if view.order else a + b) == text_of(document(0))
        swapped += view.order
    assert 120 < swapped < 180


def test_a_document_of_one_sentence_is_broken_in_its_middle():
    (view,) = cut(["11 12 13 14 15"], "next")
    assert split(view) == ([11, 12, 13], [14, 15])


def test_documents_without_enough_words():
    assert cut([], "next") == cut(["", " "], "order") == []
    (view,) = cut(["11"], "order")
    assert (view.data.tolist(), view.order, view.split) == ([CLS, 11, SEP], -1, 0)


def test_a_long_document_fills_the_view_and_begins_anywhere():
    starts = set()
    for seed in range(100):
        (view,) = cut(document(0, sentences=20), "order", seed)
        a, b = split(view)
        ids = b + a if view.order else a + b
        assert len(view.data) <= 32
        assert ids == list(range(ids[0], ids[0] + len(ids)))  # neighbours are left
        starts.add(ids[0])
        assert len(ids) == 29
    assert len(starts) > 15


def test_a_long_single_segment_begins_at_a_sentence():
    starts = {int(cut(document(0, 20), "single", seed)[0].data[1]) for seed in range(100)}
    assert starts == set(range(1000, 1075, 5))  # 30 ids fit


def test_a_tenth_of_the_rows_is_short():
    sizes = [len(cut(document(0, 20), "single", s, short=0.1)[0].data) for s in range(2000)]
    shorter = [size for size in sizes if size < 32]
    assert 150 < len(shorter) < 250
    assert (min(shorter), max(sizes)) == (4, 32)  # 2 to 30 ids and the markers
    assert sum(shorter) / len(shorter) == pytest.approx(2 + 16, abs=2)


# ---------------------------------------------------------------- foreign segments


def batch_of(pairing="next", rows=200, seed=0, **options):
    views = [cut(document(k), pairing, seed + k, **options)[0] for k in range(rows)]
    return with_strangers(views, [str(k) for k in range(rows)])


def test_half_of_the_second_segments_are_from_another_document():
    views = batch_of()
    lenders = Counter()
    for k, view in enumerate(views):
        a, b = split(view)
        own, other = {w // 1000 - 1 for w in a}, {w // 1000 - 1 for w in b}
        assert own == {k}
        assert (other == own) == (view.order == 0)
        assert len(other) == 1
        assert view.pair is None or view.order == 0
        lenders.update(other - own)
    assert 75 < sum(view.order for view in views) < 125
    assert max(lenders.values()) < 6  # nobody lends to all


def test_whose_coin_it_is():
    """Labels and first segments are the row's own, whoever else is in the batch."""
    views = batch_of()
    alone = [cut(document(k), "next", k)[0] for k in (3, 9, 50, 70)]
    some = with_strangers(alone, list("abcd"))
    assert [v.order for v in some] == [views[k].order for k in (3, 9, 50, 70)]
    assert [split(v)[0] for v in some] == [split(views[k])[0] for k in (3, 9, 50, 70)]
    again = batch_of()
    assert all(torch.equal(a.data, b.data) for a, b in zip(again, views, strict=True))


def test_rows_of_one_source_do_not_borrow_from_each_other():
    views = [cut(document(k), "next", k)[0] for k in range(40)]
    same = with_strangers(views, ["s"] * 40)
    assert all(a.data is b.data for a, b in zip(same, views, strict=True))
    two = with_strangers(views, ["s"] * 39 + ["t"])
    borrowed = [split(v)[1] for v in two[:39] if v.order]
    assert borrowed
    assert {w // 1000 - 1 for w in chain(*borrowed)} == {39}


def test_the_length_does_not_tell_foreign_pairs_from_true_ones():
    """Documents that fill the view fill it with foreign segments, too; short ones lend the rest."""
    long = [cut(document(k, 40), "next", k, length=64)[0] for k in range(400)]
    brief = [cut(document(k, 4), "next", k, length=64)[0] for k in range(400)]
    assert {len(v.data) for v in with_strangers(long, list(map(str, range(400))))} == {64}
    views = with_strangers(brief, list(map(str, range(400))))
    means = [[len(v.data) for v in views if v.order == order] for order in (0, 1)]
    true, foreign = (sum(part) / len(part) for part in means)
    assert true == 23
    assert foreign == pytest.approx(23, abs=1)


# ---------------------------------------------------------------- wiring


def test_cut_text_makes_one_view_of_a_document():
    spec = ViewSpec(modality="text", length=32, segments={"pairing": "single"})
    views = cutting.cut_text(document(0), Cut("text", spec, 0.0, 0.0, 7), Words())
    assert len(views) == 1
    assert views[0].seed == 7


@pytest.mark.parametrize(
    "fields", [{"modality": "audio"}, {"candidates": 2}, {"length": 4}], ids=str
)
def test_views_that_cannot_hold_segments_are_refused(fields):
    with pytest.raises(ValueError, match="needs a text view of at least 5 ids"):
        ViewSpec(**{"modality": "text", "segments": {"pairing": "next"}, **fields})
