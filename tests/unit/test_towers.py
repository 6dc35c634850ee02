"""Towers: padding, hidden cells, DropToken on the grid, places in the batch, pass sharing."""

from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, make_tokens, small, small_model
from tiny_run import TREE, absent_rows, take_rows, tiny_batch, tiny_model, tiny_spec
from torch import nn

from mmssl.towers import Mask, Passes, hide_cells, item_weight, spread, time_steps
from mmssl.types import UserError

VIEWS = ("audio", "video", "text")


def passes_of(model, batch, position=0.0):
    return Passes(model.towers, model.joints, model.tower_of, batch, position)


def shortened(view, lengths):
    """The view with some items cut short; what lies behind is noise that must not count."""
    return replace(view, lengths_P=torch.tensor(lengths))


def alone(view, item, length):
    """One item of a view, stored at its own length."""
    columns = {
        name: getattr(view, name)[item : item + 1]
        for name in ("rows_P", "slots_P", "seeds_P", "start_s_P")
    }
    data = view.data[item : item + 1, :length]
    return replace(view, data=data, lengths_P=torch.tensor([length]), **columns)


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize(("name", "length"), [("audio", 8000), ("video", 2), ("text", 5)])
def test_a_padded_item_equals_itself_stored_short(name, length):
    towers = {**TREE["towers"]}
    towers["audio"] = {
        **towers["audio"],
        # neither reflects at the end of a wave, nor lets a table of positions depend on the length
        "frontend": {**towers["audio"]["frontend"], "framing": "pad_end"},
    }
    for tower in towers:
        towers[tower] = {**towers[tower], "positions": {"fit": "crop"}}
    model = tiny_model(tiny_spec(towers=towers)).eval()
    view = tiny_batch(missing=False).views[name]
    full = view.data.shape[1]
    padded = model.towers[name].encode(shortened(view, [full, length] + [full] * 4), 0.0)
    short = model.towers[name].encode(alone(view, 1, length), 0.0)
    kept = ~padded.pad_PN[1]
    assert 0 < int(kept.sum()) < len(kept)
    assert not padded.pad_PN[0].any()
    torch.testing.assert_close(padded.x_PND[1][kept], short.x_PND[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.extra["agg"][1], short.extra["agg"][0], atol=1e-5, rtol=0)


def test_padding_covers_whole_time_steps_of_the_grid():
    model = tiny_model()
    view = tiny_batch(missing=False).views["video"]
    tokens = model.towers["video"].encode(shortened(view, [4, 2, 4, 4, 4, 4]), 0.0)
    assert tokens.grid == (2, 2, 2)
    assert tokens.pad_PN[1].tolist() == [False] * 4 + [True] * 4


def test_rates_are_tokens_per_second_and_centres_those_of_the_cells():
    model = tiny_model()
    batch = tiny_batch(missing=False)
    tokens = {name: passes_of(model, batch).tokens(name) for name in VIEWS}
    # 16000 Hz / hop 160 / stride 4, 4 fps / stride 2, no rate for text
    assert {n: t.rate_hz for n, t in tokens.items()} == {"audio": 25.0, "video": 2.0, "text": 0.0}
    assert model.towers["video"].first_centre() == 0.25
    # kernels of twice the stride see the middle of their cell: (4 - 1) / 2 inputs of 4
    assert model.towers["audio"].first_centre() == 1.5 / 4
    assert model.towers["text"].first_centre() == 0.0


def test_convolutional_towers_know_their_rate_too():
    spec = small("av/ave_net")
    model = small_model(spec).eval()
    batch = full_batch(spec, 2)
    passes = passes_of(model, batch)
    assert passes.tokens("video").rate_hz == 25.0  # frames are read one by one
    assert passes.tower("video").first_centre() == 0.0
    # 48000 Hz / hop 242 / stride 16
    assert passes.tokens("audio").rate_hz == pytest.approx(48000 / 242 / 16)
    field = model.towers["audio"].network.fields()[0]
    assert passes.tower("audio").first_centre() == pytest.approx(
        (field.first + 256 / 242) / 16
    )  # windows of 512


# ---------------------------------------------------------------- hidden cells


def test_hidden_cells_are_zero_and_the_rest_behind_belongs_to_the_last_token():
    signal = torch.ones(1, 2, 7, 5)
    hidden = torch.tensor([[True, False, False, False, False, True]])  # a grid of 3 x 2
    out = hide_cells(signal, hidden, (3, 2), (2, 2))
    expected = torch.ones(7, 5)
    expected[:2, :2] = 0
    expected[4:, 2:] = 0
    assert torch.equal(out, expected.expand(1, 2, 7, 5))
    assert float(signal.min()) == 1.0


def test_the_mask_embedding_marks_hidden_places_beside_what_the_stem_sees_around_them():
    model = tiny_model().eval()
    tower, view = model.towers["audio"], tiny_batch(missing=False).views["audio"]
    grid = tower.grid_of(view.data.shape[1:])
    hidden = torch.zeros(6, grid[0] * grid[1], dtype=torch.bool)
    hidden[:, :3] = True
    seen = []
    tower.positions = nn.Identity()
    tower.positions.forward = lambda x, grid, pad: seen.append(x) or x
    for value in (0.0, 7.0):
        tower.encode(view, 0.0, Mask("m", hidden, embedding_D=torch.full((16,), value)))
    torch.testing.assert_close(seen[1][:, :3], seen[0][:, :3] + 7.0)
    assert torch.equal(seen[1][:, 3:], seen[0][:, 3:])


# ---------------------------------------------------------------- DropToken


def dropping(ratio, **changes):
    towers = {name: {**t, "drop_tokens": ratio} for name, t in TREE["towers"].items()}
    return tiny_model(tiny_spec(towers=towers, **changes))


def test_dropped_tokens_are_padding_and_zero_on_the_grid():
    model, batch = dropping(0.5).train(), tiny_batch(missing=False)
    for name in VIEWS:
        tokens = passes_of(model, batch).tokens(name)
        count = tokens.pad_PN.shape[1]
        assert (tokens.pad_PN.sum(1) == count - round(count * 0.5)).all()
        assert float(tokens.x_PND[tokens.pad_PN].detach().abs().max()) == 0.0
        assert (tokens.x_PND[~tokens.pad_PN].abs().sum(-1) > 0).all()


def test_kept_tokens_stay_at_their_places():
    model, batch = dropping(0.5).train(), tiny_batch(missing=False)
    model.trunk.forward = lambda x, pad, modality=None: (x, [])  # what goes in comes out
    dropped = passes_of(model, batch).tokens("video")
    whole = passes_of(model.eval(), batch).tokens("video")
    assert torch.equal(dropped.x_PND[~dropped.pad_PN], whole.x_PND[~dropped.pad_PN])
    assert not whole.pad_PN.any()


def test_nothing_is_dropped_in_evaluation_nor_at_ratio_zero():
    batch = tiny_batch(missing=False)
    plain, dropped = tiny_model(), dropping(0.5)
    keeping = dropping(0.0)
    for name in VIEWS:
        want = passes_of(plain.train(), batch).tokens(name)
        for model in (keeping.train(), dropped.eval()):
            got = passes_of(model, batch).tokens(name)
            assert torch.equal(got.x_PND, want.x_PND)
            assert torch.equal(got.extra["agg"], want.extra["agg"])
            assert not got.pad_PN.any()


def test_an_items_dropped_tokens_depend_on_its_seed_alone():
    model, batch = dropping(0.5).train(), tiny_batch(missing=False)
    whole = passes_of(model, batch).tokens("audio").pad_PN
    part = passes_of(model, take_rows(batch, [4, 1])).tokens("audio").pad_PN
    assert torch.equal(part, whole[[1, 4]])
    assert not torch.equal(whole[1], whole[4])


def test_the_order_of_kept_tokens_is_free():
    model, batch = tiny_model().train(), tiny_batch(missing=False)
    tower = model.towers["video"]
    want = passes_of(model, batch).tokens("video")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    index = order.expand(6, -1)
    tower.dropper.forward = lambda x, uniform, drop, pad: (x[:, order], index, pad)
    got = passes_of(model, batch).tokens("video")
    torch.testing.assert_close(got.extra["agg"], want.extra["agg"], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.x_PND, want.x_PND, atol=1e-5, rtol=0)


def test_padding_is_dropped_first():
    model = dropping(0.5).train()
    view = tiny_batch(missing=False).views["text"]
    tokens = model.towers["text"].encode(shortened(view, [8, 4, 8, 8, 8, 8]), 0.0)
    assert (~tokens.pad_PN).sum(1).tolist() == [4, 2, 4, 4, 4, 4]
    assert tokens.pad_PN[1, 4:].all()


# ---------------------------------------------------------------- passes and places


def test_a_pass_is_made_once_per_mask():
    model, batch = tiny_model(), tiny_batch(missing=False)
    passes = passes_of(model, batch)
    first = passes.tokens("text")
    assert passes.tokens("text") is first
    hidden = torch.zeros(6, 8, dtype=torch.bool)
    masked = passes.tokens("text", Mask("m", hidden, altered=batch.views["text"].data))
    assert masked is not first
    assert passes.tokens("text", Mask("m", hidden)) is masked
    assert passes.token_count() == 2 * 6 * 8


def test_values_go_to_their_rows_and_slots_and_a_dummy_weighs_nothing():
    batch = tiny_batch()
    view = batch.views["audio"]
    items = torch.arange(1.0, 1 + len(view.rows_P))[:, None].expand(-1, 3).clone()
    placed = spread(items, view)
    assert placed.shape == (6, 1, 3)
    assert placed[:, 0, 0].tolist() == [1, 0, 2, 3, 4, 5]  # row 1 lacks audio
    dummy = take_rows(batch, [1]).views["audio"]
    assert item_weight(dummy).tolist() == [0.0]
    items = torch.ones(1, 3, requires_grad=True)
    out = spread(items, dummy)
    out.sum().backward()
    assert float(out.detach().abs().max()) == float(items.grad.abs().max()) == 0.0


def test_slots_hold_several_candidates():
    spec = small("avt/mmv_fac")
    view = full_batch(spec, 3).views["text"]
    placed = spread(torch.arange(15.0)[:, None], view)
    assert placed[..., 0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def grid_tokens():
    x = torch.arange(12.0).reshape(1, 12, 1)  # a grid of (3, 4)
    pad = torch.zeros(1, 12, dtype=torch.bool)
    pad[0, [3, 6, 7]] = True
    pad[0, 8:] = True
    return make_tokens(x, (3, 4), pad)


@pytest.mark.parametrize(("how", "steps"), [("mean", [1.0, 4.5, 0.0]), ("max", [2.0, 5.0, 0.0])])
def test_time_steps_reduce_over_valid_cells(how, steps):
    x, empty = time_steps(grid_tokens(), how)
    assert x[0, :, 0].tolist() == steps
    assert empty.tolist() == [[False, False, True]]


def test_time_steps_can_keep_all_tokens_and_refuse_the_rest():
    tokens = grid_tokens()
    assert time_steps(tokens, "none")[0] is tokens.x_PND
    with pytest.raises(UserError, match="'median' is not known; use max, mean or none"):
        time_steps(tokens, "median")


# ---------------------------------------------------------------- kinds of towers


def test_a_shared_trunk_has_one_name():
    model = tiny_model()
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if "blocks" in n]
    assert {n.split(".")[0] for n in names} == {"trunk", "joints"}
    assert all(tower.own_trunk is None for tower in model.towers.values())


def test_a_trunk_has_norms_for_the_modalities_that_run_through_it_only():
    towers = {"audio": TREE["towers"]["audio"]}
    views, tasks = {"audio": TREE["views"]["audio"]}, TREE["tasks"]
    one = tiny_spec(towers=towers, views=views, joints={}, tasks={"m": {**tasks["masked_audio"]}})
    names = [n for n, _ in tiny_model(one).named_parameters() if ".norm" in n and "trunk" in n]
    assert names
    assert {n.split("parts.")[1].split(".")[0] for n in names} == {"audio"}


def test_a_joint_tower_reads_its_valid_tokens_only():
    joint = tiny_model().eval().joints["av"]
    video, audio = torch.randn(3, 4, 16), torch.randn(3, 5, 16)
    free = [torch.zeros(3, n, dtype=torch.bool) for n in (4, 5)]
    pads = [p.clone() for p in free]
    pads[1][:, 3:] = True
    want = joint({"video": (video, free[0]), "audio": (audio[:, :3], free[1][:, :3])})["agg"]
    got = joint({"video": (video, free[0]), "audio": (audio, pads[1])})["agg"]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    unpadded = joint({"video": (video, free[0]), "audio": (audio, free[1])})["agg"]
    assert not torch.allclose(unpadded, want, atol=1e-3)


def test_a_joint_tower_tells_its_parts_apart_by_name_not_by_order():
    joint = tiny_model().eval().joints["av"]
    parts = {
        n: (torch.randn(2, 4, 16), torch.zeros(2, 4, dtype=torch.bool)) for n in ("video", "audio")
    }
    want = joint(parts)["agg"]
    torch.testing.assert_close(joint(dict(reversed(parts.items())))["agg"], want)
    swapped = joint({"video": parts["audio"], "audio": parts["video"]})["agg"]
    assert not torch.allclose(swapped, want, atol=1e-3)


def test_convolutional_towers_refuse_masks():
    spec = small("audio/cola")
    model = small_model(spec).eval()
    batch = full_batch(spec, 2)
    with pytest.raises(UserError, match="no masked pass"):
        passes_of(model, batch).tokens("anchor", Mask("m", torch.zeros(2, 4, dtype=torch.bool)))


def test_absent_rows_cost_no_encoding():
    model, batch = tiny_model(), tiny_batch()
    assert len(passes_of(model, absent_rows(batch, 50)).tokens("audio").x_PND) == 5


@pytest.mark.parametrize("hide", ["latents", "drop"])
def test_other_ways_to_hide_reach_the_backbone_as_they_say(hide):
    model = tiny_model().eval()
    tower, view = model.towers["audio"], tiny_batch(missing=False).views["audio"]
    grid = tower.grid_of(view.data.shape[1:])
    hidden = torch.rand(6, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)) < 0.5
    hidden |= tower.padding(view, grid) if tower.padding(view, grid) is not None else False
    mask = Mask("m", hidden, hide, torch.full((16,), 7.0) if hide == "latents" else None)
    whole, masked = tower.encode(view, 0.0), tower.encode(view, 0.0, mask)
    if hide == "latents":
        entry, plain = tower.enter(view, mask), tower.enter(view)
        torch.testing.assert_close(entry.x_PND[~hidden], plain.x_PND[~hidden])
        spots = tower.positions(torch.full_like(plain.x_PND, 7.0), grid)
        torch.testing.assert_close(entry.x_PND[hidden], spots[hidden])
        return
    assert torch.equal(masked.pad_PN, hidden)
    assert not torch.allclose(masked.x_PND[~hidden], whole.x_PND[~hidden])
    # a row with nothing hidden is encoded as without a mask
    none = tower.encode(view, 0.0, Mask("n", whole.pad_PN, "drop"))
    valid = ~whole.pad_PN
    torch.testing.assert_close(none.x_PND[valid], whole.x_PND[valid], atol=1e-5, rtol=1e-5)
