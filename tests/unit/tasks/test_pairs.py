"""`pairs`: every term against a value written out by hand, and the laws of its masks."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, small, small_model
from tiny_run import TREE, gradients, take_rows, tiny_batch, tiny_model, tiny_spec
from torch.nn import functional as F

from mmssl.types import UserError

ALIGN = TREE["tasks"]["align"]
NAMES = tuple(ALIGN["pairs"])


def align(**changes):
    """The tiny run with its pairs alone."""
    return tiny_spec(tasks={"align": {**ALIGN, **changes}}, joints={})


def one_pair(**changes):
    """A run with one pair between audio and text."""
    pair = {"between": ["audio", "text"], "space": "avt", **changes}
    return align(pairs={"at": pair})


def term(model, batch, name):
    _, terms = model(batch, 0, 10)
    return terms[f"align.{name}"]


def cosines(model, batch, a, b, space):
    """(B, B) cosines of all rows, absent ones 0."""
    z = model.tasks["align"].vectors(model.passes(batch))
    u, v = (F.normalize(z[view, space][0][:, 0], dim=-1, eps=1e-6) for view in (a, b))
    return (u @ v.T).detach()


# ---------------------------------------------------------------- values


def test_symmetric_info_nce_is_the_mean_of_two_cross_entropies():
    model, batch = tiny_model(align()), tiny_batch(missing=False)
    logits = cosines(model, batch, "video", "audio", "av") / 0.07
    target = torch.arange(6)
    want = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    got = term(model, batch, "va")
    assert int(got.count) == 6
    torch.testing.assert_close((got.sum / got.count).float()[0], want, atol=1e-5, rtol=1e-5)


def test_one_way_info_nce_asks_the_first_view_only():
    objective = {"kind": "info_nce", "form": "one_way", "temperature": 0.5}
    model, batch = tiny_model(one_pair(objective=objective)), tiny_batch(missing=False)
    logits = cosines(model, batch, "audio", "text", "avt") / 0.5
    got = term(model, batch, "at")
    want = F.cross_entropy(logits, torch.arange(6), reduction="sum")
    torch.testing.assert_close(got.sum.float()[0], want, atol=1e-5, rtol=1e-5)
    flipped = F.cross_entropy(logits.T, torch.arange(6), reduction="sum")
    assert abs(float(want - flipped)) > 1e-3


def test_rows_without_both_sides_are_left_out_of_sum_and_count():
    model, batch = tiny_model(one_pair()), tiny_batch()
    rows = [2, 3, 4, 5]  # row 0 lacks text, row 1 audio
    logits = cosines(model, batch, "audio", "text", "avt")[rows][:, rows] / 0.07
    more = cosines(model, batch, "audio", "text", "avt") / 0.07
    a2t = torch.logsumexp(more[rows][:, [1, *rows]], 1) - logits.diagonal()
    t2a = torch.logsumexp(more[[0, *rows]][:, rows], 0) - logits.diagonal()
    got = term(model, batch, "at")
    assert int(got.count) == 4
    want = ((a2t + t2a) / 2).sum()
    torch.testing.assert_close(got.sum.float()[0], want, atol=1e-4, rtol=1e-5)


def test_the_sigmoid_objective_is_siglips():
    model, batch = tiny_model(align()), tiny_batch(missing=False)
    logits = 10 * cosines(model, batch, "video", "text", "avt") - 10
    labels = 2 * torch.eye(6) - 1
    want = -F.logsigmoid(labels * logits).sum()
    got = term(model, batch, "vt")
    torch.testing.assert_close(got.sum.float()[0], want, atol=1e-4, rtol=1e-5)
    assert int(got.count) == 6
    scale = model.tasks["align"].scales["vt"]
    assert scale.bias.shape == scale.log_scale.shape == (1,)
    assert scale.bias.requires_grad
    assert scale.log_scale.requires_grad


def test_the_map_term_is_info_nce_on_the_table_of_maps():
    model, batch = tiny_model(align()), tiny_batch(missing=False)
    found, views = model.train().tasks["align"].sound_map()
    dense, score = found.features(model.passes(batch), *views), found.score
    table = score(dense.video, dense.audio, None, dense.audio_valid).detach() / 0.07
    target = torch.arange(6)
    want = (F.cross_entropy(table, target) + F.cross_entropy(table.T, target)) / 2
    got = term(model, batch, "dense")
    torch.testing.assert_close((got.sum / got.count).float()[0], want, atol=1e-5, rtol=1e-5)


def test_several_captions_are_any_of_them():
    spec = small("avt/mmv_fac")
    model, batch = small_model(spec).eval(), full_batch(spec, 4)
    z = model.tasks["align"].vectors(model.passes(batch))
    v = F.normalize(z["video", "vat"][0][:, 0], dim=-1)
    t = F.normalize(z["text", "vat"][0], dim=-1)
    forward = torch.einsum("id,jld->ijl", v, t).detach() / 0.07
    backward = torch.einsum("jd,ild->ijl", v, t).detach() / 0.07
    everything = torch.cat([forward.flatten(1), backward.flatten(1)], 1)
    own = forward.diagonal(dim1=0, dim2=1).T
    want = torch.logsumexp(everything, 1) - torch.logsumexp(own, 1)
    got = term(model, batch, "vt")
    torch.testing.assert_close(got.sum.float()[0], want.sum(), atol=1e-4, rtol=1e-5)


def test_an_unused_caption_slot_takes_no_part():
    spec = small("avt/mmv_fac")
    model, batch = small_model(spec, dtype=torch.float64).eval(), full_batch(spec, 4)
    text = batch.views["text"]
    keep = (text.rows_P != 2) | (text.slots_P < 2)
    present = text.present_BL.clone()
    present[2, 2:] = False
    columns = ("data", "lengths_P", "rows_P", "slots_P", "seeds_P", "start_s_P")
    fewer = replace(text, present_BL=present, **{c: getattr(text, c)[keep] for c in columns})
    batch.views["text"] = fewer
    z = model.tasks["align"].vectors(model.passes(batch))
    v = F.normalize(z["video", "vat"][0][:, 0], dim=-1)
    t = F.normalize(z["text", "vat"][0].flatten(0, 1)[present.flatten()], dim=-1)
    of = fewer.rows_P
    forward = (v @ t.T).detach() / 0.07
    losses = []
    for i in range(4):
        backward = (v @ t[of == i].T).flatten().detach() / 0.07
        total = torch.logsumexp(torch.cat([forward[i], backward]), 0)
        losses.append(total - torch.logsumexp(forward[i, of == i], 0))
    got = term(model, batch, "vt")
    assert float(got.sum) == pytest.approx(float(sum(losses)), rel=1e-6)


# ---------------------------------------------------------------- who competes


def test_equal_captions_are_positives_and_others_are_not():
    spec = one_pair(objective={"kind": "info_nce", "form": "one_way", "equal_text": True})
    model, batch = tiny_model(spec), tiny_batch(missing=False)
    batch.text_B[:] = torch.tensor([1, 2, 1, 4, 5, 6])
    logits = cosines(model, batch, "audio", "text", "avt") / 0.07
    total = torch.logsumexp(logits, 1)
    hits = logits.diagonal().clone()
    hits[0] = hits[2] = 0  # each has the two captions of rows 0 and 2 as positives
    pooled = torch.logsumexp(logits[[0, 2]][:, [0, 2]], 1)
    want = total.sum() - hits.sum() - pooled.sum()
    torch.testing.assert_close(term(model, batch, "at").sum.float()[0], want, atol=1e-4, rtol=1e-5)


def test_rows_of_one_source_are_no_negatives():
    objective = {"kind": "info_nce", "form": "one_way"}
    model, batch = tiny_model(one_pair(objective=objective)), tiny_batch(missing=False)
    batch.source_B[:] = torch.tensor([7, 8, 7, 9, 10, 11])
    logits = cosines(model, batch, "audio", "text", "avt") / 0.07
    logits[0, 2] = logits[2, 0] = -math.inf
    want = F.cross_entropy(logits, torch.arange(6), reduction="sum")
    torch.testing.assert_close(term(model, batch, "at").sum.float()[0], want, atol=1e-4, rtol=1e-5)


def test_an_equal_caption_does_not_count_a_row_that_lacks_the_other_side():
    """Row 1 has text but no audio; row 3 says the same and has audio."""
    spec = one_pair(objective={"kind": "info_nce", "equal_text": True})
    model, batch = tiny_model(spec), tiny_batch()
    batch.text_B[3] = batch.text_B[1]
    got = term(model, batch, "at")
    assert int(got.count) == 4
    # row 1 is a candidate: its caption is a second positive of row 3's audio; but no query
    logits = cosines(model, batch, "audio", "text", "avt") / 0.07
    rows, captions, sounds = [2, 3, 4, 5], [1, 2, 3, 4, 5], [0, 2, 3, 4, 5]
    a2t = torch.logsumexp(logits[rows][:, captions], 1) - logits.diagonal()[rows]
    a2t[1] = torch.logsumexp(logits[3, captions], 0) - torch.logsumexp(logits[3, [1, 3]], 0)
    t2a = torch.logsumexp(logits[sounds][:, rows], 0) - logits.diagonal()[rows]
    want = ((a2t + t2a) / 2).sum()
    torch.testing.assert_close(got.sum.float()[0], want, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------- chunks and gradients


@pytest.mark.parametrize("missing", [False, True])
def test_chunks_change_neither_terms_nor_gradients(missing):
    batch = tiny_batch(missing=missing)
    whole = tiny_model(align(), dtype=torch.float64)
    chunked = tiny_model(align(chunk=4), dtype=torch.float64)
    for model in (whole, chunked):
        model(batch, 0, 10)
    for name in NAMES:
        a, b = (term(m, batch, name) for m in (whole, chunked))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)
    (_, a), (_, b) = gradients(whole, batch), gradients(chunked, batch)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9)


def test_chunked_mil_nce_equals_the_whole():
    spec = small("avt/mmv_fac")
    batch = full_batch(spec, 5)
    losses = [
        float(small_model(s, dtype=torch.float64)(batch, 0, 10)[0].detach())
        for s in (spec, small("avt/mmv_fac", "tasks.align.chunk=2"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_pair_reaches_both_towers_its_heads_and_its_scale(name):
    model = tiny_model(align(pairs={name: ALIGN["pairs"][name]}))
    pair = model.tasks["align"].pairs[name]
    batch = tiny_batch()
    _, grads = gradients(model, batch)
    reached = {n for n, g in grads.items() if float(g.abs().max()) > 0}
    for view in pair.between:
        assert any(n.startswith(f"towers.{view}.stem") for n in reached)
    assert any(n.startswith(f"tasks.align.scales.{name}") for n in reached)
    own = "scores" if name == "dense" else "embedder"
    assert any(n.startswith(f"tasks.align.{own}") for n in reached)
    others = set(batch.views) - set(pair.between)
    assert not any(n.startswith(f"towers.{view}.") for n in reached for view in others)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    model, batch = tiny_model(align(), dtype=torch.float64), tiny_batch(4, missing=False)
    name = "tasks.align.embedder.heads.heads.audio_to_avt.layers.1.weight"
    _, grads = gradients(model, batch)
    weight = model.get_parameter(name)
    values = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            weight[0, 0] += step
            _, terms = model(batch, 0, 10)
            values.append(sum(float(t.sum / t.count) for t in terms.values()))
            weight[0, 0] -= step
    # the loss itself is fp32, the terms are not
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(float(grads[name][0, 0]), rel=1e-5)


# ---------------------------------------------------------------- scale


def test_a_learned_scale_is_held_at_its_bound_and_can_come_back():
    objective = {"kind": "info_nce", "form": "one_way", "max_scale": 20.0}
    model, batch = tiny_model(one_pair(objective=objective)), tiny_batch(missing=False)
    scale = model.tasks["align"].scales["at"]
    with torch.no_grad():
        scale.log_scale.fill_(math.log(500.0))
    want = F.cross_entropy(
        20 * cosines(model, batch, "audio", "text", "avt"), torch.arange(6), reduction="sum"
    )
    torch.testing.assert_close(term(model, batch, "at").sum.float()[0], want, atol=1e-4, rtol=1e-5)
    _, grads = gradients(model, batch)
    assert float(grads["tasks.align.scales.at.log_scale"].abs()) > 0


def test_a_fixed_temperature_is_no_parameter_but_is_saved():
    spec = one_pair(objective={"kind": "info_nce", "learned": False, "temperature": 0.1})
    model = tiny_model(spec)
    name = "tasks.align.scales.at.log_scale"
    assert name not in dict(model.named_parameters())
    assert float(model.state_dict()[name].exp()) == pytest.approx(10.0)


def test_a_bilinear_score_has_no_second_scale():
    spec = one_pair(score={"kind": "bilinear"})
    assert not list(tiny_model(spec).tasks["align"].scales["at"].parameters())


# ---------------------------------------------------------------- wiring


def test_vectors_are_remembered_for_the_monitors_present_rows_only():
    model, batch = tiny_model(align()).train(), tiny_batch()
    model(batch, 0, 10)
    sizes = {name: tuple(z.shape) for name, z in model.last_embeddings.items()}
    assert sizes == {f"align.{v}.{s}": (5, 8) for v, s in model.tasks["align"].space_keys()}
    assert not any(z.requires_grad for z in model.last_embeddings.values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.align.pairs.vt.objective.kind=info_nce"], "several candidates must come second"),
        (["tasks.align.pairs.vt.between=[text,video]"], "several candidates must come second"),
        (["tasks.align.pairs.vt.space=null"], r"pairs\.vt\.space: choose one of va, vat"),
        (["tasks.align.pairs.vt.space=va"], "no way from text to space 'va' in graph fac"),
    ],
)
def test_pairs_that_cannot_work_are_refused(overrides, message):
    spec = small("avt/mmv_fac", *overrides)
    with pytest.raises(UserError, match=message):
        small_model(spec)(full_batch(spec, 4), 0, 10)


AT = "tasks.align.pairs.at={between: [audio, text], space: vat, objective: {kind: mil_nce}}"


def test_fac_trains_audio_against_text_with_a_norm_of_its_own_only():
    spec = small("avt/mmv_fac", AT)
    with pytest.raises(
        UserError, match="evaluation only; to train audio against text set audio_norm"
    ):
        small_model(spec).train()(full_batch(spec, 4), 0, 10)
    spec = small("avt/mmv_fac", AT, "tasks.align.heads.audio_norm=true")
    model = small_model(spec)
    _, grads = gradients(model, full_batch(spec, 4))
    assert {n for n, _ in model.named_parameters()} == set(grads)
    assert float(grads["tasks.align.embedder.heads.audio_norm.weight"].abs().max()) > 0
    assert model.space_for("audio", "text") == "vat"


def test_two_views_of_one_modality_share_head_and_tower():
    model = small_model(small("audio/cola"))
    heads = model.tasks["cola"].embedder.heads.heads
    assert list(heads) == ["audio_to_cola"]
    assert list(model.towers) == ["audio"]


def test_a_pair_needs_no_space_name_where_there_is_one():
    heads = {"spaces": {"only": {"dim": 8}}}
    pairs = {"at": {"between": ["audio", "text"]}}
    model = tiny_model(align(heads=heads, pairs=pairs))
    assert model.tasks["align"].space_keys() == [("audio", "only"), ("text", "only")]


def test_a_row_order_changes_nothing():
    model, batch = tiny_model(align(), dtype=torch.float64), tiny_batch()
    order = [3, 0, 5, 1, 4, 2]
    for name in NAMES:
        a, b = term(model, batch, name), term(model, take_rows(batch, order), name)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
