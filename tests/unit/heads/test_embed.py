"""Pooling of token grids, and vectors of views in spaces."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_methods import full_batch, make_tokens, small, small_model
from tiny_run import TREE, tiny_batch, tiny_model, tiny_spec
from torch import nn

from mmssl.heads.embed import Embedder, pool
from mmssl.heads.project import SpaceHeads
from mmssl.specs import SpaceSpec
from mmssl.types import UserError


def tokens_of(values, grid, pad=None, extra=None):
    """Tokens of width 1 from plain numbers."""
    x = torch.tensor(values, dtype=torch.float32)[..., None]
    return make_tokens(x, grid, None if pad is None else torch.tensor(pad), extra)


def test_mean_and_max_leave_padding_out():
    tokens = tokens_of(
        [[1.0, 5.0, 100.0], [-4.0, 3.0, 2.0]], (3,), [[False, False, True], [False] * 3]
    )
    assert pool(tokens, "mean")[:, 0].tolist() == pytest.approx([3.0, 1 / 3])
    assert pool(tokens, "max")[:, 0].tolist() == [5.0, 3.0]


def test_a_global_token_comes_by_its_name_first():
    agg = torch.tensor([[9.0]])
    assert pool(tokens_of([[1.0, 2.0]], (2,), extra={"agg": agg, "mean": agg + 1}), "agg") is agg
    assert float(pool(tokens_of([[1.0, 2.0]], (2,), extra={"mean": agg + 1}), "mean")) == 10.0


def test_an_unknown_pooling_lists_the_known_ones():
    known = "agg, mean, max, mean_max, peaks, last, steps"
    with pytest.raises(UserError, match=f"'cls' is not known; use one of {known}"):
        pool(tokens_of([[1.0]], (1,), extra={"agg": torch.zeros(1, 1)}), "cls")


def test_steps_take_the_strongest_cell_of_each_instant_and_then_average_in_time():
    # a grid of 4 instants with 2 cells; two steps of two instants each
    tokens = tokens_of([[1.0, 9.0, 3.0, 2.0, 5.0, 5.0, -1.0, -7.0]], (4, 2))
    assert pool(tokens, "steps", 2)[0, :, 0].tolist() == [(9 + 3) / 2, (5 - 1) / 2]
    assert pool(tokens, "steps", 4)[0, :, 0].tolist() == [9.0, 3.0, 5.0, -1.0]


def test_peaks_are_the_mean_over_time_of_the_strongest_cells():
    tokens = tokens_of([[1.0, 9.0, 3.0, 2.0, 5.0, 5.0, -1.0, -7.0]], (4, 2))
    assert pool(tokens, "peaks")[0].tolist() == [(9 + 3 + 5 - 1) / 4]
    late = tokens_of([[1.0, 9.0, 3.0, 2.0]], (2, 2), [[True, False, True, True]])
    assert pool(late, "peaks")[0].tolist() == [9.0]


def test_steps_split_an_instant_by_its_overlap_and_leave_padding_out():
    tokens = tokens_of([[1.0, 2.0, 6.0]], (3,))
    # a step covers 1.5 instants: (1 + 2 / 2) / 1.5 and (2 / 2 + 6) / 1.5
    assert pool(tokens, "steps", 2)[0, :, 0].tolist() == pytest.approx([2 / 1.5, 7 / 1.5])
    padded = tokens_of([[1.0, 2.0, 6.0]], (3,), [[False, False, True]])
    assert pool(padded, "steps", 2)[0, :, 0].tolist() == pytest.approx([2 / 1.5, 2.0])
    nothing = tokens_of([[1.0, 2.0, 6.0, 6.0]], (4,), [[False, False, True, True]])
    assert pool(nothing, "steps", 2)[0, :, 0].tolist() == [1.5, 0.0]


# ---------------------------------------------------------------- vectors


def vectors(model, batch):
    return model.tasks["align"].vectors(model.passes(batch))


def test_vectors_of_steps_are_one_projection_per_step_side_by_side():
    model, batch = tiny_model().eval(), tiny_batch(missing=False)
    z, filled = vectors(model, batch)["audio", "av"]
    tokens = model.passes(batch).tokens("audio")
    head = model.tasks["align"].embedder.heads.heads["audio_to_av"]
    steps = pool(tokens, "steps", 2)
    want = torch.cat([head(steps[:, 0]), head(steps[:, 1])], dim=-1)
    torch.testing.assert_close(z[:, 0], want)
    assert filled.all()
    assert z.shape == (6, 1, 8)


def test_a_vector_of_steps_scores_what_happens_at_the_same_time():
    """The dot product of two such vectors is the sum over the steps of dot products."""
    model, batch = tiny_model().eval(), tiny_batch(missing=False)
    v, a = (vectors(model, batch)[name, "av"][0][:, 0] for name in ("video", "audio"))
    by_step = (v.reshape(6, 2, 4)[:, None] * a.reshape(6, 2, 4)[None]).sum(-1)
    torch.testing.assert_close(v @ a.T, by_step.sum(-1))


def test_absent_rows_hold_zeros_and_say_so():
    model, batch = tiny_model().eval(), tiny_batch()
    for (view, _), (z, filled) in vectors(model, batch).items():
        assert torch.equal(filled, batch.views[view].present_BL)
        assert float(z[~filled].detach().abs().max()) == 0.0
        assert (z[filled].abs().sum(-1) > 0).all()


def test_each_head_runs_once_though_several_pairs_read_it(monkeypatch):
    spec = small("avt/mmv_fac")
    model, calls = small_model(spec), []
    heads = model.tasks["align"].embedder.heads
    for name, head in [*heads.heads.items(), ("va_vat", heads.va_vat)]:
        forward = head.forward
        monkeypatch.setattr(
            head,
            "forward",
            lambda *args, name=name, forward=forward: calls.append(name) or forward(*args),
        )
    model.train()(full_batch(spec, 4), 0, 10)
    assert sorted(calls) == ["audio_to_va", "text_to_vat", "va_vat", "video_to_va"]


def test_a_rank_without_videos_leaves_the_batch_statistics_alone():
    spec = small("avt/mmv_fac")
    model, batch = small_model(spec).train(), full_batch(spec, 4)
    batch.views["video"] = dummy(batch.views["video"])
    names = [n for n, _ in model.named_buffers() if "running" in n]
    before = {n: model.get_buffer(n).clone() for n in names}
    vectors(model, batch)
    assert names
    for name in names:
        assert torch.equal(model.get_buffer(name), before[name])


def dummy(view):
    """The view as a batch without any of its items carries it."""
    columns = {
        name: getattr(view, name)[:1]
        for name in ("data", "lengths_P", "rows_P", "slots_P", "seeds_P", "start_s_P")
    }
    return replace(view, **columns, present_BL=torch.zeros_like(view.present_BL), dummy=True)


def test_spaces_know_their_members():
    model = tiny_model()
    heads = set(model.tasks["align"].embedder.heads.heads)
    assert heads == {"audio_to_av", "video_to_av", "audio_to_avt", "video_to_avt", "text_to_avt"}
    assert model.tasks["align"].embedder.evaluation_spaces("audio") == []


def test_a_space_dimension_must_divide_into_its_steps():
    tree = {**TREE["tasks"]["align"]}
    tree["heads"] = {"spaces": {"av": {"dim": 9, "pool": "steps", "steps": 2}, "avt": {"dim": 8}}}
    with pytest.raises(
        UserError, match=r"tasks\.align\.heads\.spaces\.av: .*dim \(9\).* steps \(2\)"
    ):
        tiny_model(tiny_spec(tasks={**TREE["tasks"], "align": tree}))


def test_a_space_may_pool_each_modality_in_its_own_way():
    tree = {**TREE["tasks"]["align"]}
    pools = {"audio": "max", "video": "mean", "text": "agg"}
    tree["heads"] = {"spaces": {"av": {"dim": 8, "pool": pools}, "avt": {"dim": 8, "pool": pools}}}
    model = tiny_model(tiny_spec(tasks={"align": tree}, joints={})).eval()
    batch = tiny_batch(missing=False)
    passes, heads = model.passes(batch), model.tasks["align"].embedder.heads.heads
    for (view, space), (z, _) in vectors(model, batch).items():
        want = heads[f"{view}_to_{space}"](pool(passes.tokens(view), pools[view]))
        torch.testing.assert_close(z[:, 0], want)


def test_a_space_must_say_how_it_pools_every_modality():
    tree = {**TREE["tasks"]["align"]}
    tree["heads"] = {"spaces": {"av": {"dim": 8}, "avt": {"dim": 8, "pool": {"audio": "max"}}}}
    with pytest.raises(UserError, match="says nothing about video; add it"):
        vectors(tiny_model(tiny_spec(tasks={"align": tree}, joints={})), tiny_batch())


def test_empty_steps_enter_no_batch_statistics():
    torch.manual_seed(0)
    batch = tiny_batch(4, missing=False)
    x = torch.randn(4, 4, 6)
    pad = torch.zeros(4, 4, dtype=torch.bool)
    pad[0, 2:] = True  # a clip of half the length
    tokens = make_tokens(x, (4,), pad, view=batch.views["audio"])
    heads = SpaceHeads("linear", {"audio": 6}, {"av": 3}, {"av": ["audio"]}, "bn_linear")
    embedder = Embedder(heads, {"av": SpaceSpec(dim=6, pool="steps", steps=2)}, {"audio": "audio"})
    passes = SimpleNamespace(tokens=lambda view: tokens, vectors={})
    (z,) = embedder(passes, "audio", ["av"])[0].values()
    steps = x.reshape(4, 2, 2, 6).mean(2)
    rows = torch.cat([steps[0, :1], steps[1:].flatten(0, 1)])
    normed = nn.functional.batch_norm(rows, None, None, training=True)
    want = normed @ heads.heads["audio_to_av"].layers[1].weight.T
    torch.testing.assert_close(z[1:, 0].reshape(6, 3), want[1:], atol=1e-5, rtol=1e-5)
    assert float(z[0, 0, 3:].detach().abs().max()) == 0.0
