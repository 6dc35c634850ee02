import numpy as np
import pytest
import torch

from mmssl.eval import parts
from mmssl.eval.embed import collect
from mmssl.types import UserError


@pytest.fixture
def whole(batches, knowing_model):
    rows, encoded = collect({"m": knowing_model("perfect")}, batches)
    return rows, encoded["m"]


def test_parts_hold_each_row_once(whole):
    rows, _ = whole
    found = parts.split(rows, "class")
    assert list(found) == sorted({str(m["class"]) for m in rows.meta})
    assert sorted(np.concatenate(list(found.values()))) == list(range(len(rows.keys)))
    for value, kept in found.items():
        assert {rows.meta[i]["class"] for i in kept} == {value}


def test_rows_without_the_field_are_in_no_part(whole):
    rows, _ = whole
    found = parts.split(rows, "silent_class")
    assert sum(map(len, found.values())) == sum(bool(m.get("silent_class")) for m in rows.meta)


def test_an_unknown_field_is_refused(whole):
    with pytest.raises(UserError, match=r"split_by=colour.*class"):
        parts.split(whole[0], "colour")


def test_a_part_is_what_reading_only_its_clips_gives(whole, batches, knowing_model):
    rows, encoded = whole
    count = sum(batch.size for batch in batches[:2])
    few_rows, few = parts.take(rows, encoded, np.arange(count))
    alone_rows, alone = collect({"m": knowing_model("perfect")}, batches[:2])
    assert few_rows == alone_rows
    alone, before = alone["m"], few.dense.rows_P
    for key, vectors in alone.vectors.items():
        assert np.array_equal(few.vectors[key], vectors)
        assert np.array_equal(few.present[key], alone.present[key])
    for name in ("own_N", "other_N"):
        assert np.array_equal(getattr(few, name), getattr(alone, name), equal_nan=True)
    for name in ("rows_P", "times_PT", "loud_PT"):
        assert np.array_equal(getattr(few.dense, name), getattr(alone.dense, name))
    for name in ("video_PTSD", "audio_PAD", "valid_PA"):  # the model's noise goes on over batches
        assert torch.equal(getattr(few.dense, name), getattr(encoded.dense, name)[: len(before)])


def test_rows_of_local_features_are_renumbered(whole):
    rows, encoded = whole
    kept = np.arange(len(rows.keys))[3::2]
    few_rows, few = parts.take(rows, encoded, kept)
    before = [rows.keys[i] for i in encoded.dense.rows_P if i in kept]
    assert [few_rows.keys[i] for i in few.dense.rows_P] == before
    assert len(few.dense.video_PTSD) == len(before)
