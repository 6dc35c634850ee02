"""Rows to batches: places, padding, dummies, and the packed form that travels."""

import multiprocessing

import pytest
import torch

from mmssl import rng
from mmssl.data.collate import Item, collate, failed, pack, text_id
from mmssl.specs import SegmentsSpec, ViewSpec
from mmssl.types import Pair, UserError, View

SPECS = {
    "a": ViewSpec(modality="audio", crop_s=0.5, hz=100),
    "free": ViewSpec(modality="audio", hz=100),
    "v": ViewSpec(modality="video", crop_s=1.0, fps=4, size=6),
    "t": ViewSpec(modality="text", length=5, candidates=3),
}


def item(k, **views):
    captions = ["A  cat", "b"] if views.get("t") else []
    return Item(f"key{k}", f"source{k // 2}", 10 * k, captions, views, {"k": k})


def audio(length, seed=1, start=0.25):
    return [View(torch.arange(1, length + 1).float(), 100.0, start, seed)]


def video(count, seed=2, side=6):
    return [View(torch.full((count, side, side, 3), 7, dtype=torch.uint8), 4.0, 0.5, seed)]


def text(*lengths):
    return [View(torch.arange(1, n + 1), 0.0, 0.0, 3 + i) for i, n in enumerate(lengths)]


ROWS = [
    item(0, a=audio(50), free=audio(7), t=text(2, 5)),
    item(1, v=video(4)),
    item(2, a=audio(30, seed=9), free=audio(9), v=video(3, seed=8), t=text(1, 1, 1)),
]


@pytest.fixture(params=[False, True])
def batch(request):
    return pack(ROWS, SPECS, shared=request.param).unpack()


def test_rows_keep_their_order(batch):
    assert batch.keys == ["key0", "key1", "key2"]
    assert batch.index_B.tolist() == [0, 10, 20]
    assert batch.source_B[0] == batch.source_B[1] != batch.source_B[2]
    assert batch.source_B[0] == rng.seed_of("source", "source0")
    assert batch.meta == [{"k": 0}, {"k": 1}, {"k": 2}]


def test_only_present_items_are_stored(batch):
    a = batch.views["a"]
    assert a.present_BL.tolist() == [[True], [False], [True]]
    assert (a.rows_P.tolist(), a.slots_P.tolist()) == ([0, 2], [0, 0])
    assert (a.lengths_P.tolist(), a.seeds_P.tolist()) == ([50, 30], [1, 9])
    assert a.data.shape == (2, 50)
    assert a.data[1].tolist() == [*range(1, 31), *[0] * 20]
    assert a.start_s_P.tolist() == [0.25, 0.25]
    assert (a.rate, a.modality, a.dummy) == (100.0, "audio", False)


def test_text_candidates_fill_slots(batch):
    t = batch.views["t"]
    assert t.present_BL.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert t.rows_P.tolist() == [0, 0, 2, 2, 2]
    assert t.slots_P.tolist() == [0, 1, 0, 1, 2]
    assert t.data[0].tolist() == [1, 2, 0, 0, 0]
    assert t.seeds_P.tolist() == [3, 4, 3, 4, 5]
    assert t.data.dtype == torch.int64


def test_lengths_without_a_crop_follow_the_longest(batch):
    assert batch.views["free"].data.shape == (2, 9)


def test_video_is_padded_in_time(batch):
    v = batch.views["v"]
    assert (v.data.shape, v.data.dtype) == ((2, 4, 6, 6, 3), torch.uint8)
    assert v.data[1, 2].eq(7).all()
    assert v.data[1, 3].eq(0).all()


def test_text_ids_ignore_case_and_spaces():
    assert text_id(["A  cat "]) == text_id(["a cat", "other"]) != text_id(["a dog"])
    assert text_id([]) == 0
    assert collate(ROWS, SPECS).text_B.tolist() == [text_id(["a cat"]), 0, text_id(["a cat"])]


def test_view_without_items_holds_a_dummy():
    empty = collate([item(0), item(1)], SPECS)
    shapes = {name: tuple(v.data.shape) for name, v in empty.views.items()}
    assert shapes == {"a": (1, 50), "free": (1, 100), "v": (1, 4, 6, 6, 3), "t": (1, 5)}
    for view in empty.views.values():
        assert view.dummy
        assert not view.present_BL.any()
        assert not view.data.any()
        assert view.lengths_P.tolist() == [view.data.shape[1]]
        assert (view.rows_P.tolist(), view.slots_P.tolist(), view.seeds_P.tolist()) == (
            [0],
            [0],
            [0],
        )


def pairs(count, seed=0):
    made = []
    for k in range(count):
        first, second = [10 * k + 5], [10 * k + 6, 10 * k + 7]
        data = torch.tensor([1, *first, 2, *second, 2])
        pair = Pair(first, second, second, 5, (1, 2))
        view = View(data, 0.0, 0.0, seed + k, split=3, order=0, pair=pair)
        made.append(item(2 * k, t=[view]))
    return made


def test_pairs_borrow_their_second_segment_in_the_batch():
    segments = {"pairing": "next"}
    specs = {"t": ViewSpec(modality="text", length=8, segments=segments), "a": SPECS["a"]}
    t = collate(pairs(40), specs).views["t"]
    assert t.split_P.tolist() == [3] * 40
    assert t.data.shape == (40, 8)
    own = t.data[:, 3] - t.data[:, 1] == 1
    assert torch.equal(t.order_P, (~own).long())
    assert 10 < int(t.order_P.sum()) < 30
    kept = {"t": specs["t"].model_copy(update={"segments": SegmentsSpec(pairing="order")})}
    assert not collate(pairs(40), kept).views["t"].order_P.any()
    assert collate(pairs(1), specs).views["a"].split_P is None
    empty = collate([item(0)], specs).views["t"]
    assert (empty.split_P.tolist(), empty.order_P.tolist()) == ([0], [-1])


def test_empty_batch():
    assert collate([], SPECS).size == 0


def test_law_of_absent_rows():
    """Rows without an item change nothing but the presence table."""
    with_absent = collate([ROWS[0], item(9), ROWS[2]], SPECS)
    without = collate([ROWS[0], ROWS[2]], SPECS)
    for name, view in without.views.items():
        other = with_absent.views[name]
        assert torch.equal(view.data, other.data)
        assert torch.equal(view.seeds_P, other.seeds_P)


def test_frames_of_two_sizes_are_refused():
    with pytest.raises(
        UserError, match=r"views\.v: frames of different sizes.*set the view's `size`"
    ):
        collate([item(0, v=video(4)), item(1, v=video(4, side=8))], SPECS)


def test_a_batch_is_one_block(batch):
    pointers = {
        batch.views["a"].data.untyped_storage().data_ptr(),
        batch.index_B.untyped_storage().data_ptr(),
    }
    assert len(pointers) == 1
    for view in batch.views.values():
        assert view.data.data_ptr() % 64 == 0


def _send(queue):
    torch.set_num_threads(1)
    queue.put(pack(ROWS, SPECS, shared=True))
    queue.join()


def test_packed_batches_cross_processes():
    context = torch.multiprocessing.get_context("fork")
    queue = context.JoinableQueue()
    child = context.Process(target=_send, args=(queue,))
    child.start()
    received = queue.get(timeout=60).unpack()
    expected = collate(ROWS, SPECS)
    assert torch.equal(received.views["a"].data, expected.views["a"].data)
    assert torch.equal(received.views["v"].data, expected.views["v"].data)
    assert received.keys == expected.keys
    queue.task_done()
    child.join(60)
    assert child.exitcode == 0
    assert not multiprocessing.active_children()


def test_failure_is_raised_by_the_receiver():
    with pytest.raises(UserError, match="too many"):
        failed("too many").unpack()
