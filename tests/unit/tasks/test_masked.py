"""`masked`: hidden input reaches nothing visible, targets are exact, choices are the rows' own."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import small, small_model
from tiny_run import TREE, absent_rows, gradients, take_rows, tiny_batch, tiny_model, tiny_spec
from torch import nn

from mmssl.check import SPECIAL, VOCABULARY
from mmssl.frontends.patches import cells_of
from mmssl.targets.ids import IdTarget
from mmssl.tasks.masked import keep_items
from mmssl.towers import hide_cells
from mmssl.types import UserError


def alone(name, tower=None, **changes):
    """A run with one masked task, perhaps on another tower."""
    view = TREE["tasks"][name]["view"]
    towers = {**TREE["towers"], view: {**TREE["towers"][view], **(tower or {})}}
    task = {**TREE["tasks"][name], **changes}
    views = {view: TREE["views"][view]}
    return tiny_spec(tasks={name: task}, joints={}, towers={view: towers[view]}, views=views)


def model_of(name, tower=None, **changes):
    return tiny_model(alone(name, tower, **changes))


def batch_for(model, rows=6, **options):
    return tiny_batch(rows, spec=model.spec, missing=False, **options)


def predict(task, passes, batch):
    """Prediction and truth of every token, and which ones count."""
    seen = task._seen(passes, batch)
    target = task.target
    if isinstance(target, IdTarget):
        return target.head(seen.tokens.x_PND), seen.view.data, seen.hidden_PN
    truth = target.truth(seen.tower, seen.view)
    return target.head(seen.tokens, seen.hidden_PN), truth, seen.hidden_PN


class Leaf(nn.Module):
    """A signal front-end whose output is a leaf, so that gradients can be read there."""

    def __init__(self, signal):
        super().__init__()
        self.signal, self.leaf = signal, None
        self.params = getattr(signal, "params", None)
        self.grid, self.out_lengths = signal.grid, signal.out_lengths

    def forward(self, data, lengths=None):
        if self.leaf is None:
            self.leaf = self.signal(data, lengths).detach().requires_grad_()
        return self.leaf


# ---------------------------------------------------------------- leaks

OVERLAP = {"kind": "conv", "channels": [4, 8], "strides": [2, 2], "kernels": [5, 4]}
CASES = {
    "audio_conv": ("masked_audio", {"cut": {**OVERLAP, "norm": "group"}}, {}),
    "audio_random": ("masked_audio", {}, {"mask": {"rule": "random", "ratio": 0.6}}),
    "audio_spans": (
        "masked_audio",
        {
            "frontend": {"kind": "waveform"},
            "cut": {**OVERLAP, "strides": [16, 10], "kernels": [40, 25]},
        },
        {"mask": {"rule": "spans", "start_prob": 0.1, "length": 4}},
    ),
    "audio_patches": (
        "masked_audio",
        {"cut": {"kind": "patches", "patch": [4, 8]}},
        {"mask": {"rule": "random", "ratio": 0.5}},
    ),
    "video_merge": (
        "masked_video",
        {"cut": {**OVERLAP, "temporal_kernel": 4, "temporal_stride": 2}},
        {"mask": {"rule": "random", "ratio": 0.5}, "rows": 1.0},
    ),
    "video_fold": (
        "masked_video",
        {"cut": {**OVERLAP, "fold": 2, "norm": "group"}},
        {"mask": {"rule": "random", "ratio": 0.5}, "rows": 1.0},
    ),
    "video_merged_cells": (
        "masked_video",
        {"cut": {**OVERLAP, "kernels": [6, 5], "merge": 2, "fold": 2}},
        {"mask": {"rule": "random", "ratio": 0.5}, "rows": 1.0},
    ),
    "video_patches": (
        "masked_video",
        {"cut": {"kind": "patches", "patch": [2, 4, 4]}},
        {"mask": {"rule": "tubes", "ratio": 0.5}, "rows": 1.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_depends_on_hidden_input(case):
    """Gradient probe: tokens, predictions and global tokens against every input cell."""
    name, tower, changes = CASES[case]
    model = model_of(name, tower, **changes).train()
    task, view = model.tasks[name], model.spec.tasks[name].view
    tower = model.towers[view]
    leaf = tower.signal = Leaf(tower.signal)
    batch = batch_for(model, 3)
    passes = model.passes(batch, 0.0)
    prediction, _, hidden = predict(task, passes, batch)
    tokens = next(iter(passes._done.values()))
    seen = hide_cells(torch.ones_like(leaf.leaf), hidden, tokens.grid, tower.cell)
    assert 0.2 < float(seen.mean()) < 0.8
    g = torch.Generator().manual_seed(0)
    for output in (prediction, tokens.x_PND, tokens.extra["agg"]):
        weights = torch.randn(output.shape, generator=g)
        (grad,) = torch.autograd.grad((output * weights).sum(), leaf.leaf, retain_graph=True)
        assert float(grad[seen == 0].abs().max()) == 0.0
        inner = grad[seen == 1].abs() > 0  # and on what is visible, everything depends
        assert float(inner.float().mean()) > 0.9


@pytest.mark.parametrize("channels", ["motion", "rgb_motion", "foreground"])
def test_tubes_do_not_leak_through_the_motion_channel(channels):
    """Frames are bytes: the hidden ones are replaced instead of differentiated."""
    tower = {"frontend": {"kind": "frames", "channels": channels}}
    model = model_of("masked_video", tower, rows=1.0).eval()
    batch = batch_for(model, 4)
    task, video = model.tasks["masked_video"], batch.views["video"]
    before, _, hidden = predict(task, model.passes(batch), batch)
    frames = torch.ones(4, 1, *video.data.shape[1:4])
    seen = hide_cells(frames, hidden, (2, 2, 2), model.towers["video"].cell)[:, 0, ..., None] > 0
    other = torch.where(seen, video.data, 255 - video.data)
    assert not torch.equal(other, video.data)
    batch.views["video"] = replace(video, data=other)
    after, truth, again = predict(task, model.passes(batch), batch)
    assert torch.equal(hidden, again)
    assert torch.equal(before, after)
    assert truth.shape[-1] == (1 if channels == "motion" else 4) * 2 * 8 * 8


@pytest.mark.parametrize("rule", ["random", "blocks"])
def test_other_rules_with_a_motion_channel_are_refused(rule):
    tower = {"frontend": {"kind": "frames", "channels": "rgb_motion"}}
    with pytest.raises(UserError, match=rf"tasks\.masked_video\.mask\.rule: {rule} would leak"):
        model_of("masked_video", tower, mask={"rule": rule})


def test_text_reads_its_replaced_ids_only():
    model = model_of("masked_text", mask={"rule": "words", "ratio": 0.5, "shares": [1.0, 0.0]})
    batch, task = batch_for(model), model.eval().tasks["masked_text"]
    before, truth, hidden = predict(task, model.passes(batch), batch)
    view = batch.views["text"]
    swapped = torch.where(hidden, (view.data - 100) % 400 + 50, view.data)
    batch.views["text"] = replace(view, data=swapped)
    after, other, again = predict(task, model.passes(batch), batch)
    assert torch.equal(hidden, again)
    assert torch.equal(before, after)
    assert not torch.equal(truth, other)
    embedding = model.towers["text"].stem.table.weight
    (grad,) = torch.autograd.grad(after.sum(), embedding)
    only_hidden = set(swapped[hidden].tolist()) - set(swapped[~hidden].tolist())
    assert float(grad[sorted(only_hidden)].abs().max()) == 0.0


# ---------------------------------------------------------------- targets


def test_targets_are_the_input_cells_cut_by_hand():
    model = model_of("masked_video")
    batch = batch_for(model, 2)
    tower = model.towers["video"]
    values = model.tasks["masked_video"].target.truth(tower, batch.views["video"])
    pixels = batch.views["video"].data.float() / 255 * 2 - 1
    # token (t, h, w) = (1, 0, 1) covers frames 2 and 3, rows 0 to 7, columns 8 to 15
    cell = pixels[:, 2:4, 0:8, 8:16].permute(0, 4, 1, 2, 3).flatten(1)
    torch.testing.assert_close(values[:, 1 * 4 + 0 * 2 + 1], cell, atol=1e-6, rtol=0)
    assert values.shape == (2, 8, 3 * 2 * 8 * 8)


def test_spectrogram_targets_are_cells_of_the_spectrogram():
    model = model_of("masked_audio")
    batch = batch_for(model, 2)
    tower, view = model.towers["audio"], batch.views["audio"]
    values = model.tasks["masked_audio"].target.truth(tower, view)
    signal = tower.signal(view.data)
    assert signal.shape[2:] == (101, 16)
    torch.testing.assert_close(values[:, 7], signal[:, 0, 28:32].flatten(1))
    assert values.shape == (2, 25, 64)  # the last frame fills no cell and is cut off


def test_cells_are_cut_or_filled_with_zeros_to_the_grid():
    signal = torch.arange(1.0, 8.0).reshape(1, 1, 7)
    assert cells_of(signal, (2,), (3,)).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert cells_of(signal, (3,), (3,)).tolist() == [[[1, 2, 3], [4, 5, 6], [7, 0, 0]]]


def test_normalised_targets_have_zero_mean_and_unit_variance_each():
    target = {"kind": "patches", "normalize": True}
    model = model_of("masked_video", target=target, rows=1.0)
    batch = batch_for(model, 3)
    values = model.tasks["masked_video"].target.truth(model.towers["video"], batch.views["video"])
    torch.testing.assert_close(values.mean(-1), torch.zeros(3, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.var(-1), torch.ones(3, 8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_the_term_is_the_error_at_hidden_places(loss):
    model = model_of("masked_audio", target={"kind": "patches", "loss": loss}).eval()
    batch = batch_for(model)
    task = model.tasks["masked_audio"]
    prediction, truth, hidden = predict(task, model.passes(batch), batch)
    error = (prediction - truth)[hidden].detach()
    each = (
        error.square()
        if loss == "mse"
        else torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)
    )
    _, terms = model(batch, 0, 10)
    got = terms["masked_audio"]
    assert int(got.count) == int(hidden.sum()) == 6 * round(0.5 * 25)
    assert float(got.sum / got.count) == pytest.approx(float(each.mean()), rel=1e-5)


def test_all_hidden_tokens_are_predicted_though_the_tower_drops_tokens():
    model = model_of("masked_audio", {"drop_tokens": 0.6}).train()
    batch = batch_for(model)
    passes = model.passes(batch, 0.0)
    _, truth, hidden = predict(model.tasks["masked_audio"], passes, batch)
    assert int(hidden.sum()) == 6 * round(0.5 * 25)
    assert not next(iter(passes._done.values())).pad_PN.any()
    assert not truth.requires_grad


def test_padding_is_neither_hidden_nor_predicted():
    model = model_of("masked_audio", mask={"rule": "random", "ratio": 0.8}).eval()
    batch = batch_for(model, 3)
    view = batch.views["audio"]
    batch.views["audio"] = replace(view, lengths_P=torch.tensor([16000, 6400, 16000]))
    _, _, hidden = predict(model.tasks["masked_audio"], model.passes(batch), batch)
    tower = model.towers["audio"]
    pad = tower.padding(batch.views["audio"], (25, 1))
    assert pad[1].sum() == 15
    assert not (hidden & pad).any()
    assert hidden.sum(1).tolist() == [20, 8, 20]


# ---------------------------------------------------------------- whose mask


@pytest.mark.parametrize("name", ["masked_audio", "masked_video", "masked_text"])
def test_a_rows_mask_does_not_depend_on_its_batch(name):
    model = model_of(name, **({"rows": 1.0} if name == "masked_video" else {}))
    batch, task = batch_for(model), model.tasks[name]

    def hidden_of(b):
        return predict(task, model.passes(b, 0.0), b)[2]

    whole = hidden_of(batch)
    assert torch.equal(hidden_of(take_rows(batch, [1, 4])), whole[[1, 4]])
    assert torch.equal(hidden_of(absent_rows(batch, 3)), whole)
    assert not torch.equal(whole[0], whole[1])
    view = batch.views[task.view]
    batch.views[task.view] = replace(view, seeds_P=view.seeds_P + 1)
    assert not torch.equal(hidden_of(batch), whole)


def test_two_masked_tasks_of_one_view_hide_different_cells():
    task = TREE["tasks"]["masked_audio"]
    model = tiny_model(tiny_spec(tasks={"one": task, "two": task}, joints={}))
    batch = tiny_batch(missing=False)
    passes = model.passes(batch)
    one, two = (predict(model.tasks[n], passes, batch)[2] for n in ("one", "two"))
    assert not torch.equal(one, two)
    assert len(passes._done) == 2


# ---------------------------------------------------------------- text


def test_special_pieces_are_never_predicted_and_padding_neither():
    model = model_of("masked_text", mask={"rule": "words", "ratio": 0.9})
    batch = batch_for(model, 6)
    view = batch.views["text"]
    data = view.data.clone()
    data[:, 0], data[:, 5], data[:, 6:] = SPECIAL["bos"], SPECIAL["eos"], SPECIAL["pad"]
    data[2, 3] = SPECIAL["unk"]
    batch.views["text"] = replace(view, data=data, lengths_P=torch.full((6,), 6))
    _, truth, hidden = predict(model.tasks["masked_text"], model.passes(batch, 0.0), batch)
    assert not set(truth[hidden].tolist()) & set(SPECIAL.values())
    assert hidden.sum(1).tolist() == [4, 4, 3, 4, 4, 4]  # round(0.9 * 4), round(0.9 * 3)


def test_ids_are_replaced_eighty_ten_ten():
    model = model_of("masked_text", mask={"rule": "words", "ratio": 0.5})
    batch = batch_for(model, 2000)
    task, view = model.tasks["masked_text"], batch.views["text"]
    hidden = task._hidden(model.towers["text"], view, 0.0)
    ids = task.target.altered(model.towers["text"], view, hidden)
    assert torch.equal(ids[~hidden], view.data[~hidden])
    new, old = ids[hidden], view.data[hidden]
    masked, kept = new == SPECIAL["mask"], new == old
    count = len(new)
    assert count == 2000 * 4  # round(0.5 * 7), halves to even
    for share, rate in ((masked, 0.8), (kept, 0.1), (~masked & ~kept, 0.1)):
        assert abs(float(share.float().mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / count)
    swapped = new[~masked & ~kept]
    assert int(swapped.min()) > max(SPECIAL.values())
    assert int(swapped.max()) < VOCABULARY


def test_the_term_of_text_is_the_cross_entropy_of_the_true_ids():
    model = model_of("masked_text").eval()
    batch = batch_for(model)
    task = model.tasks["masked_text"]
    prediction, truth, hidden = predict(task, model.passes(batch), batch)
    want = nn.functional.cross_entropy(prediction[hidden], truth[hidden])
    _, terms = model(batch, 0, 10)
    got = terms["masked_text"]
    assert float(got.sum / got.count) == pytest.approx(float(want.detach()), rel=1e-5)
    assert task.target.head.layers[-1].out_features == VOCABULARY


# ---------------------------------------------------------------- rows


def test_a_share_of_the_rows_takes_part_in_training_and_all_in_evaluation():
    model = model_of("masked_audio", rows=0.25)
    batch = batch_for(model, 800)
    view, task = batch.views["audio"], model.tasks["masked_audio"]
    small_view = replace(view, data=view.data[:, :1600], lengths_P=torch.full((800,), 1600))
    batch.views["audio"] = small_view
    task.train()
    part = task._rows(small_view)
    assert abs(len(part.rows_P) / 800 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 800)
    assert part.present_BL.sum() == len(part.rows_P)
    assert part.present_BL[part.rows_P].all()
    # a row's choice is its own
    alone_ = task._rows(take_rows(batch, [3, 7, 8, 9, 10, 11]).views["audio"])
    chosen = set(part.rows_P.tolist())
    places = [[3, 7, 8, 9, 10, 11][i] for i in alone_.rows_P.tolist()]
    assert alone_.dummy or set(places) == chosen & {3, 7, 8, 9, 10, 11}
    _, terms = model.eval()(batch_for(model, 6), 0, 10)
    assert int(terms["masked_audio"].count) == 6 * 12


def test_when_no_row_takes_part_a_dummy_keeps_the_graph_whole():
    model = model_of("masked_audio", rows=1e-9)
    batch = batch_for(model)
    _, grads = gradients(model, batch)
    assert set(grads) == {n for n, _ in model.named_parameters()}
    assert all(float(g.abs().max()) == 0.0 for g in grads.values())
    _, terms = model.train()(batch, 0, 10)
    assert int(terms["masked_audio"].count) == 0
    assert float(terms["masked_audio"].sum) == 0.0


def test_kept_items_keep_their_places():
    view = tiny_batch().views["audio"]  # row 1 is absent
    kept = keep_items(view, torch.tensor([True, False, True, False, True]))
    assert kept.rows_P.tolist() == [0, 3, 5]
    assert kept.present_BL[:, 0].tolist() == [True, False, False, True, False, True]
    assert torch.equal(kept.data, view.data[[0, 2, 4]])
    none = keep_items(view, torch.zeros(5, dtype=torch.bool))
    assert none.dummy
    assert len(none.data) == 1
    assert not none.present_BL.any()


# ---------------------------------------------------------------- evaluation and wiring


def test_stats_hold_what_the_mean_and_the_unigram_baseline_need():
    spec = tiny_spec(
        tasks={n: t for n, t in TREE["tasks"].items() if n.startswith("masked")}, joints={}
    )
    model, batch = tiny_model(spec), tiny_batch(missing=False)
    stats = model.masked_stats(batch)
    task = model.eval().tasks["masked_video"]
    _, truth, hidden = predict(task, model.passes(batch), batch)
    cells = truth[hidden].double()
    video = stats["masked_video"]
    mean_error = float(video["square_sum"] - (video["target_sum"] ** 2 / video["cells"]).sum())
    assert mean_error == pytest.approx(float((cells - cells.mean(0)).square().sum()), rel=1e-6)
    text = stats["masked_text"]
    assert float(text["histogram"].sum()) == float(text["count"])
    assert 0 <= float(text["correct"]) <= float(text["count"])


def test_a_hidden_layer_in_the_head():
    model = model_of("masked_audio", hidden=12)
    shapes = [tuple(p.shape) for p in model.tasks["masked_audio"].target.head.parameters()]
    assert shapes == [(12, 16), (12,), (64, 12), (64,)]


def test_convolutional_towers_are_refused_when_the_run_is_built():
    task = "tasks.m={kind: masked, view: anchor, mask: {rule: random}, target: {kind: patches}}"
    with pytest.raises(UserError, match=r"tasks\.m\.view: anchor has a convolutional backbone"):
        small_model(small("audio/cola", task))
