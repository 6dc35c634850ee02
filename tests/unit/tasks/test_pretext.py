"""`classify` by turns and by order: what is encoded, start values, and what takes part."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, small, small_model
from tiny_run import tiny_batch, tiny_model, tiny_spec, unlabelled

from mmssl import config
from mmssl.types import UserError
from mmssl.views.pretext import permutations


def one(name, **changes):
    """The tiny run with one of its pretext tasks."""
    wired = unlabelled()
    target = {**wired["tasks"][name]["target"], **changes}
    return tiny_spec(**{**wired, "tasks": {name: {"kind": "classify", "target": target}}})


def zero_head(model, name):
    for parameter in model.tasks[name].head[-1].parameters():
        torch.nn.init.zeros_(parameter)
    return model


def shorter(batch, view, lengths):
    changed = replace(batch.views[view], lengths_P=torch.tensor(lengths))
    return replace(batch, views={**batch.views, view: changed})


@pytest.mark.parametrize("view", ["video", "audio"])
def test_turns_cost_ln_4_with_a_zero_head_and_present_items_count_four_times(view):
    spec = one("turn", view=view)
    model = zero_head(tiny_model(spec), "turn").train()
    _, terms = model(tiny_batch(spec=spec), 0, 10)  # one of six rows lacks the view
    assert int(terms["turn"].count) == 20
    assert float(terms["turn"].sum) / 20 == pytest.approx(math.log(4), abs=1e-6)
    assert model.tasks["turn"].weight("accuracy") == [0.0]


def test_a_turned_clip_swaps_the_classes_of_its_turns():
    """Logits of class k on turn j of a clip are those on turn j - 1 of the clip turned once."""
    spec = one("turn")
    model, batch = tiny_model(spec).eval(), tiny_batch(3, missing=False, spec=spec)
    heard = []
    model.tasks["turn"].head.register_forward_hook(lambda _, __, out: heard.append(out.detach()))
    frames = batch.views["video"]
    turned = replace(frames, data=torch.rot90(frames.data, 1, (2, 3)))
    model(batch, 0, 10)
    model(replace(batch, views={**batch.views, "video": turned}), 0, 10)
    plain, once = (logits.reshape(4, 3, 4) for logits in heard)
    torch.testing.assert_close(once, plain.roll(-1, 0), rtol=1e-4, atol=1e-5)
    assert float((plain[0] - plain[1]).abs().max()) > 1e-4


def test_rotnet_runs_on_the_shared_transformer_by_one_line():
    shared = "shared={width: 16, layers: 1, head_size: 8, hidden: 32}"
    tower = "towers.x={globals: [agg], cut: {kind: patches, patch: [1, 8, 8]}}"
    spec = config.load("rotnet_tiny", ["towers.x.backbone=shared", tower, shared])
    model = small_model(spec).train()
    loss, _ = model(full_batch(spec), 0, 10)
    loss.backward()
    assert float(model.trunk.blocks[0].attention.qkv.weight.grad.abs().max()) > 0


def turns_found(shade, steps=300):
    """Share of turns that RotNet tells after so many steps, on 1,280 new noisy pictures.

    shade: how much lighter their lowest row is than their highest.
    """
    sizes = ["towers.x.backbone.channels=[16, 16, 16, 16, 16]", "tasks.rotation.embed=[32]"]
    model = small_model(small("rotnet_tiny", *sizes)).train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)

    def pictures(seed):
        batch = full_batch(model.spec, 8, seed)
        view = batch.views["x"]
        noise = torch.randn(view.data.shape, generator=torch.Generator().manual_seed(seed))
        slope = torch.linspace(-0.5, 0.5, view.data.shape[2])[:, None, None]
        light = 0.5 + 0.15 * noise + shade * slope
        data = (255 * light).clamp(0, 255).to(view.data.dtype)
        return replace(batch, views={"x": replace(view, data=data)})

    for step in range(steps):
        loss, _ = model(pictures(step), step, steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        terms = [model.eval()(pictures(10_000 + i), 0, 10)[1] for i in range(40)]
    found = [t["rotation.accuracy"] for t in terms]
    assert sum(int(t.count) for t in found) == 1280
    return sum(float(t.sum) for t in found) / 1280


def test_turns_of_noise_look_alike_and_those_of_a_gradient_do_not():
    """Above chance on noise would be a trace that turning itself leaves."""
    assert turns_found(shade=0.0) == pytest.approx(0.25, abs=0.03)
    assert turns_found(shade=0.2) > 0.95


def test_equal_scores_of_tiles_cost_the_noise_and_have_no_tau():
    spec = small(
        "permutations_tiny", "tasks.order.target.tiles=[5]", "tasks.order.target.samples=2000"
    )
    model = zero_head(small_model(spec), "order").train()
    _, terms = model(full_batch(spec, 12), 0, 10)
    want = 5 * 4 / (2 * math.sqrt(math.pi))
    assert float(terms["order"].sum / terms["order"].count) == pytest.approx(want, rel=0.02)
    assert float(terms["order.tau"].sum) == 0


def test_a_tile_is_read_by_itself_and_slots_hold_what_the_target_says():
    """A vector of a slot has a gradient to the frames of its own tile's stretch alone."""
    spec = one("order", tiles=[4])
    model, batch = tiny_model(spec).eval(), tiny_batch(2, missing=False, spec=spec)
    read = []
    task = model.tasks["order"]
    task.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    view = batch.views["audio"]
    signal = model.towers["audio"].inputs(view).detach().requires_grad_()
    model(replace(batch, views={**batch.views, "audio": replace(view, signal=signal)}), 0, 10)
    slots = read[0].reshape(2, 4, -1)
    frames = signal.shape[2]
    order = permutations(view.seeds_P, 4, "order/order")
    for row in range(2):
        for slot in range(4):
            (grad,) = torch.autograd.grad(slots[row, slot, 0], signal, retain_graph=True)
            touched = grad.abs().sum((1, 3)).nonzero()
            assert set(touched[:, 0].tolist()) == {row}
            stretch = order[row, slot] * frames / 4
            assert int(touched[0, 1]) >= int(stretch)
            assert int(touched[-1, 1]) <= int(stretch + frames / 4)


def test_items_too_short_for_the_tiles_take_no_part_not_even_in_batch_norms():
    """Five tiles of 16 frames, of a hop of 24 samples: 80 frames, which 79 hops have."""
    spec = config.load("permutations_tiny")
    model, twin = (small_model(spec).train() for _ in range(2))
    batch = shorter(full_batch(spec, 3), "x", [2400, 79 * 24, 79 * 24 - 1])
    _, terms = model(batch, 0, 10)
    assert int(terms["order"].count) == int(terms["order.tau"].count) == 2
    batch.views["x"].data[2] = 0.9
    _, again = twin(batch, 0, 10)
    assert float(again["order"].sum) == float(terms["order"].sum)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    loss, terms = model(shorter(batch, "x", [240, 240, 240]), 0, 10)
    assert loss.item() == 0
    assert int(terms["order"].count) == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"tasks\.order\.target\.tiles: \[500\] of a signal"):
        tiny_model(one("order", tiles=[500]))
    with pytest.raises(UserError, match=r"target\.tiles: .*too small.*use fewer"):
        small_model(small("permutations_tiny", "tasks.order.target.tiles=[20]"))
    wave = {
        "modality": "audio",
        "frontend": {"kind": "waveform"},
        "cut": {"kind": "patches", "patch": [160]},
    }
    spec = one("turn", view="audio")
    tree = spec.model_dump(mode="json", by_alias=True)
    tree["towers"]["audio"] = wave
    with pytest.raises(UserError, match="turns upside down what has bands"):
        tiny_model(type(spec).model_validate(tree))
    text = tiny_spec(
        joints={},
        tasks={"turn": {"kind": "classify", "target": {"kind": "rotation", "view": "text"}}},
    )
    with pytest.raises(UserError, match="ids have no signal"):
        tiny_model(text)


@pytest.mark.slow
def test_ten_pieces_of_a_rising_tone_are_put_in_order():
    spec = config.load("permutations_tiny", ["tasks.order.target.tiles=[10]", "views.x.crop_s=0.6"])
    model = small_model(spec).train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    seconds = torch.arange(4800) / 8000

    def tau(step):
        batch = full_batch(spec, 8, step)
        start = 300 + 200 * torch.rand(8, 1, generator=torch.Generator().manual_seed(step))
        wave = 0.1 * torch.sin(2 * math.pi * (start * seconds + 2700 * seconds**2))
        view = replace(batch.views["x"], data=wave)
        loss, terms = model(replace(batch, views={"x": view}), step, 100)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return float(terms["order.tau"].sum / terms["order.tau"].count)

    found = [tau(step) for step in range(100)]
    assert abs(sum(found[:5]) / 5) < 0.5
    assert sum(found[-10:]) / 10 > 0.9
