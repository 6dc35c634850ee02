from dataclasses import replace

import numpy as np
import pytest
import torch

from mmssl.eval.embed import Want, collect, derangement, localizable
from mmssl.types import UserError


def test_rows_and_vectors_keep_the_order_of_the_batches(batches, knowing_model):
    model = knowing_model()
    rows, found = collect({"m": model}, batches)
    assert rows.keys == [f"clip-{i}" for i in range(48)]
    expected = torch.cat([model.embed(b)["audio", "common"][0] for b in batches])
    assert np.allclose(found["m"].vectors["audio", "common"], expected)
    assert found["m"].dense.rows_P.tolist() == list(range(1, 48, 2))


def test_results_do_not_depend_on_the_batch_size(batches, make_batches, knowing_model):
    _, one = collect({"m": knowing_model()}, batches)
    _, two = collect({"m": knowing_model()}, make_batches(48, 7))
    for space, vectors in one["m"].vectors.items():
        assert np.array_equal(vectors, two["m"].vectors[space])
    assert np.array_equal(one["m"].dense.audio_PAD, two["m"].dense.audio_PAD)
    assert np.array_equal(one["m"].dense.rows_P, two["m"].dense.rows_P)


def test_absent_rows_are_zero_and_not_present(batches, knowing_model):
    class Half(knowing_model):
        def embed(self, batch):
            there = torch.arange(batch.size) % 2 == 0
            return {k: (v, there) for k, (v, _) in super().embed(batch).items()}

    _, found = collect({"m": Half()}, batches)
    vectors, there = (getattr(found["m"], n)["text", "common"] for n in ("vectors", "present"))
    assert there.sum() == 24
    assert (np.linalg.norm(vectors, axis=1) > 0).tolist() == there.tolist()


def test_only_what_is_wanted_is_computed(batches, knowing_model):
    wants = {"m": Want(embeddings=False, dense=True, match=False, masked=False)}
    _, found = collect({"m": knowing_model()}, batches, wants)
    assert not found["m"].vectors
    assert not found["m"].masked
    assert found["m"].own_N is None
    assert found["m"].dense is not None


def test_masked_sums_are_added_over_batches(batches, knowing_model):
    _, found = collect({"m": knowing_model()}, batches)
    assert found["m"].masked["hide_sound"]["count"].tolist() == [20.0]  # five batches of four
    assert found["m"].masked["hide_words"]["histogram"].tolist() == [10, 25, 15]


def test_training_flag_is_restored_and_no_gradients_are_kept(batches, knowing_model):
    class Checks(knowing_model):
        def embed(self, batch):
            assert not self.training
            assert torch.is_inference_mode_enabled()
            return super().embed(batch)

    model = Checks().train()
    collect({"m": model}, batches)
    assert model.training
    with pytest.raises(RuntimeError, match="boom"):
        collect({"m": model}, _failing(batches))
    assert model.training


def _failing(batches):
    yield batches[0]
    raise RuntimeError("boom")


def test_a_derangement_uses_every_audio_once_and_no_source_twice(batches):
    batch = batches[0]
    for seed in range(5):
        partner, apart = derangement(batch, np.random.default_rng(seed))
        assert sorted(partner.tolist()) == list(range(batch.size))
        assert apart.all()
        assert (partner != torch.arange(batch.size)).all()


def test_rows_of_one_source_are_not_paired_where_it_can_be_avoided(batches):
    batch = replace(batches[0], source_B=torch.arange(10) // 5)
    partner, apart = derangement(batch, np.random.default_rng(0), tries=2000)
    assert apart.sum() >= 6
    assert (batch.source_B[apart] != batch.source_B[partner[apart]]).all()
    alone = replace(batches[0], source_B=torch.zeros(10, dtype=torch.int64))
    assert not derangement(alone, np.random.default_rng(0))[1].any()


def test_match_scores_of_rows_without_partner_are_nan(batches, knowing_model):
    first = batches[0]
    silent = replace(first.views["sound"], present_BL=first.views["sound"].present_BL.clone())
    silent.present_BL[3] = False
    batch = replace(first, views={**first.views, "sound": silent})
    _, found = collect({"m": knowing_model()}, [batch])
    assert np.flatnonzero(np.isnan(found["m"].own_N)).tolist() == [3]
    assert (found["m"].own_N[[0, 1, 2]] > 0).all()
    assert (found["m"].other_N[[0, 1, 2]] < 0).all()


def test_audible_bins_come_from_the_sound_view(batches, knowing_model):
    _, found = collect({"m": knowing_model()}, batches)
    # the first of two seconds is loud; bins are half a second long
    assert found["m"].dense.loud_PT.tolist() == [[True, True, False, False]] * 24


def test_clips_with_different_grids_are_refused(batches, knowing_model):
    class Odd(knowing_model):
        def dense(self, batch):
            dense = super().dense(batch)
            return dense if batch.size == 10 else replace(dense, grid=(4, 4, 16))

    with pytest.raises(UserError, match="different grids"):
        collect({"m": Odd()}, batches)


def test_an_empty_data_set_is_refused(knowing_model):
    with pytest.raises(UserError, match="no clip"):
        collect({"m": knowing_model()}, [])


def test_localizable_needs_both_boxes():
    box = [[0, 0, 1, 1]]
    assert localizable({"boxes": {"sounding": box, "silent": box}})
    assert not localizable({"boxes": {"sounding": box, "silent": None}})
    assert not localizable({"boxes": None})
    assert not localizable({})


def test_encodings_of_a_batch_are_shared_by_all_methods(batches, knowing_model):
    made = []

    class Counts(knowing_model):
        def passes(self, batch):
            made.append(batch.keys)
            return object()

        def embed(self, batch):
            assert self.passes(batch) is self.passes(batch)
            return super().embed(batch)

    model = Counts()
    collect({"m": model}, batches)
    assert made == [batch.keys for batch in batches]
    with pytest.raises(RuntimeError, match="boom"):
        collect({"m": model}, _failing(batches))
    assert model.passes(batches[0]) is not model.passes(batches[0])
